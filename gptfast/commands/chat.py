"""`gptfast chat`: a prompt that a base model continues, line by line. It has no roles, and says so.

A model that was fine-tuned for dialogue has roles: each line is a turn of the user, in the template that the folder records.
"""

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
from gptfast.tasks import dialogue

if TYPE_CHECKING:
    from gptfast.generation.engine import Engine

BANNER = """{model} is a base model: it continues text. It plays no role, follows no instructions and writes on where text
stops. What you type becomes a new line of the text; an empty line lets it write on.
/text shows the text so far, /reset forgets it, /help says this again. Ctrl-C ends an answer, Ctrl-D the session."""
DIALOGUE_BANNER = """{model} was fine-tuned for dialogue: each line that you type is a turn, which it answers as it was shown in its
training data. It is no source of facts or advice. /text shows the conversation, /reset forgets it, /help says this again. Ctrl-C
ends an answer, Ctrl-D the session."""


class Session:
    """The text so far, yours and the model's."""

    banner = BANNER

    def __init__(self, engine: Engine, model: str, params: SamplingParams) -> None:
        self.engine, self.model, self.params = engine, model, params
        self.text = ""
        self.answers = 0

    def take(self, line: str) -> None:
        """One line that was typed: a command, or text to go on from."""
        if line.startswith("/"):
            self._obey(line.strip())
            return
        text = self.text + ("\n" if self.text and line else "") + line
        answer = self._answer(text)
        if answer is not None:
            self.text = text + answer

    def _forget(self) -> None:
        self.text = ""

    def _obey(self, word: str) -> None:
        if word == "/text":
            print(self.text, flush=True)
        elif word == "/reset":
            self._forget()
            note("the text is forgotten")
        else:
            if word != "/help":
                note(f"{word} is no command")
            note(self.banner.format(model=self.model))

    def _answer(self, text: str) -> str | None:
        """Streams what the model writes and returns what was shown, also where Ctrl-C ended it; None after an error."""
        params = dataclasses.replace(self.params, seed=((self.params.seed or 0) + self.answers) % 2**63)  # two answers differ
        shown = ""
        try:
            for piece in self.engine.stream(text, params):
                if piece.error:
                    raise Error(piece.error)
                new = self._shown(piece.text, not shown)
                shown += new
                sys.stdout.write(new)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note(" (stopped)")
        except Error as error:  # a text longer than the context, half a character: the session goes on without it
            note(f"gptfast: error: {error} (/reset forgets the text)")
            return None
        print(flush=True)
        self.answers += 1
        return shown

    def _shown(self, piece: str, first: bool) -> str:
        """What of a piece is shown; `first`: nothing was before."""
        return piece


class Conversation(Session):
    """Turns, yours and the model's, in a template of tasks/dialogue.py."""

    banner = DIALOGUE_BANNER

    def __init__(self, engine: Engine, model: str, params: SamplingParams, template: str) -> None:
        params = dataclasses.replace(params, stop=(*params.stop, *dialogue.stop_strings(template)))
        super().__init__(engine, model, params)
        self.template = template
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> None:
        """One line that was typed: a command, or what the user says; an empty one says nothing."""
        if line.startswith("/"):
            self._obey(line.strip())
            return
        if not line.strip():
            return
        asked = [*self.messages, {"role": "user", "content": line}]
        answer = self._answer(dialogue.render(asked, self.template))
        if answer is not None and answer.strip():
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self.text = dialogue.render(self.messages, self.template, generation_prompt=False)

    def _forget(self) -> None:
        self.text, self.messages = "", []

    def _shown(self, piece: str, first: bool) -> str:
        return piece.lstrip() if first else piece


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
    """Type text and let a base model continue it, line by line: it plays no role and follows no instructions.

    A model that was fine-tuned for dialogue answers instead.
    """
    speculation = given.pop("speculation", None)
    params = with_seed(SamplingParams(**given))
    if params.n != 1:
        raise Error(f"--n is {params.n}; chat has one answer to a line")
    with running(common) as device, open_engine(model, common, device, speculation) as engine:
        template = dialogue.recorded(model)
        session = Session(engine, model, params) if template is None else Conversation(engine, model, params, template)
        note(f"seed {params.seed}\n{session.banner.format(model=model)}")
        for line in lines():
            session.take(line)
    return {"model": model, "seed": params.seed, "answers": session.answers, "text": session.text}
