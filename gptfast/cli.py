"""The `gptfast` command: the app with all its commands, and how each way of ending becomes a line and an exit code.

0; 2 for the user's input (one line, `gptfast: error: ...`); 1 for a defect (one line that says where the traceback is); 75 after
SIGTERM with a checkpoint saved; 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
import warnings
from typing import Annotated

import typer

import gptfast
from gptfast.commands import GROUPS, app, chat, machine, note, plan, run, serve, start, task
from gptfast.errors import Error

__all__ = ["app", "chat", "machine", "main", "plan", "run", "serve", "start", "task"]  # importing them adds their commands
app.registered_commands.sort(key=lambda info: GROUPS.index(str(info.rich_help_panel)))  # the help lists them in this order


def _show_version(asked: bool) -> None:
    if asked:
        print(f"gptfast {gptfast.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version", show_default="off")
    ] = False,
) -> None:
    """Trains, fine-tunes and runs GPT-2-family models fast on whatever hardware is there."""


# what a full disk, a missing file or a closed door is, wherever it happens: the user's, and said in one line
_USERS_ERRNO = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EFBIG", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOENT", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG")
    if hasattr(errno, name)
)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _user_error(error: BaseException) -> str | None:
    """The one line for what is the user's to mend, or None for a defect of gptfast."""
    if isinstance(error, Error):
        return _one_line(error)
    if hasattr(error, "format_message"):  # Typer's usage errors, whichever module its version defines them in
        return _one_line(error.format_message())
    if isinstance(error, OSError) and error.errno in _USERS_ERRNO:
        return _one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return None


def _report_defect(error: BaseException, debug: bool) -> None:
    """Writes the traceback to a file and says where; --debug shows it as well."""
    lines = "".join(traceback.format_exception(error))
    if debug:
        sys.stderr.write(lines)
    handle, path = tempfile.mkstemp(prefix="gptfast-", suffix=".txt", text=True)
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"gptfast {gptfast.__version__}, python {sys.version}\n{' '.join(sys.argv)}\n\n{lines}")
    hint = "" if debug else " (--debug shows it)"
    note(f"gptfast: internal error: {type(error).__name__}: {_one_line(error)[:200]}; the traceback is in {path}{hint}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line (default: sys.argv) and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *place, **more: note(f"gptfast: warning: {_one_line(message)}")
            code = typer.main.get_command(app).main(arguments, prog_name="gptfast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        note("gptfast: stopped")
        return 130
    except BrokenPipeError:
        # the reader has what it wanted; the interpreter must not complain about the rest while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = _user_error(error)
        if line is None:
            _report_defect(error, "--debug" in arguments)
            return 1
        if "--debug" in arguments:
            traceback.print_exception(error)
        note(f"gptfast: error: {line}")
        return 2
