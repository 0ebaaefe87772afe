"""`gptfast chat`: a prompt that a base model continues, line by line. It has no roles, and says so."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gptfast.commands import RUN, Common, Model, command, note, running
from gptfast.commands.run import SPECULATIVE, open_engine, with_seed
from gptfast.errors import Error
from gptfast.generation.parameters import SamplingParams
from gptfast.options import keys

if TYPE_CHECKING:
    from gptfast.generation.engine import Engine

BANNER = """{model} is a base model: it continues text. It plays no role, follows no instructions and writes on where text
stops. What you type becomes a new line of the text; an empty line lets it write on.
/text shows the text so far, /reset forgets it, /help says this again. Ctrl-C ends an answer, Ctrl-D the session."""


class Session:
    """The text so far, yours and the model's."""

    def __init__(self, engine: Engine, model: str, params: SamplingParams) -> None:
        self.engine, self.model, self.params = engine, model, params
        self.text = ""
        self.answers = 0

    def take(self, line: str) -> None:
        """One line that was typed: a command, or text to go on from."""
        if line.startswith("/"):
            self._obey(line.strip())
            return
        self._answer(self.text + ("\n" if self.text and line else "") + line)

    def _obey(self, word: str) -> None:
        if word == "/text":
            print(self.text, flush=True)
        elif word == "/reset":
            self.text = ""
            note("the text is forgotten")
        else:
            if word != "/help":
                note(f"{word} is no command")
            note(BANNER.format(model=self.model))

    def _answer(self, text: str) -> None:
        """Streams what the model writes; the text grows by what was shown, also where Ctrl-C ended it."""
        params = dataclasses.replace(self.params, seed=((self.params.seed or 0) + self.answers) % 2**63)  # two answers differ
        shown = []
        try:
            for piece in self.engine.stream(text, params):
                if piece.error:
                    raise Error(piece.error)
                shown.append(piece.text)
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note(" (stopped)")
        except Error as error:  # a text longer than the context, half a character: the session goes on without it
            note(f"gptfast: error: {error} (/reset forgets the text)")
            return
        print(flush=True)
        self.text = text + "".join(shown)
        self.answers += 1


def lines() -> Iterator[str]:
    """What is typed until Ctrl-D; Ctrl-C forgets the line. On a terminal with a prompt and the keys of readline."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # input() uses it once it is imported
            importlib.import_module("readline")
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\nCtrl-D ends the session")
        except UnicodeDecodeError as error:
            note(f"gptfast: error: the line is not UTF-8 (byte {error.start})")


@command(RUN, "device dtype threads backend", Sampling=keys(SamplingParams), Speculation=SPECULATIVE)
def chat(model: Model, common: Common, given: dict[str, Any]) -> dict[str, Any]:
    """Type text and let a base model continue it, line by line: it plays no role and follows no instructions."""
    speculation = given.pop("speculation", None)
    params = with_seed(SamplingParams(**given))
    if params.n != 1:
        raise Error(f"--n is {params.n}; chat has one answer to a line")
    with running(common) as device, open_engine(model, common, device, speculation) as engine:
        session = Session(engine, model, params)
        note(f"seed {params.seed}\n{BANNER.format(model=model)}")
        for line in lines():
            session.take(line)
    return {"model": model, "seed": params.seed, "answers": session.answers, "text": session.text}
