"""Dialogue: turns of a system, a user and an assistant as plain text, and the loss on what the assistant says.

A template writes a conversation down; its name is recorded in the folder of a model that was fine-tuned with it, and read by chat
and the server. Templates are plain text without special tokens, so that any GPT-2 vocabulary can be used as it is. The end of the
assistant's turn is the token <|endoftext|> as a target only: it is what the model is trained to say there, and never stands in the
conversation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gptfast.config import option
from gptfast.errors import Error, shown
from gptfast.tasks.answers import continuations, target_loss, texts
from gptfast.tasks.files import Record
from gptfast.tasks.task import IGNORED, Encoded, Example, Task

if TYPE_CHECKING:
    from gptfast.tokenizer import GPT2Tokenizer

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """heads: what stands before a role's turns, lead: between head and content, end: after the content."""

    heads: Mapping[str, str]
    lead: str
    end: str


TEMPLATES: dict[str, Template] = {
    "plain": Template({"system": "System:", "user": "User:", "assistant": "Assistant:"}, " ", "\n"),
    "markdown": Template({"system": "### System", "user": "### User", "assistant": "### Assistant"}, "\n", "\n\n"),
}


def _form(template: Template | str) -> Template:
    """A template, or the one of that name. Raises gptfast.Error, with the names there are, for another."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise Error(f"template is {shown(template)}; allowed: {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def check(messages: Any) -> list[dict[str, str]]:
    """Messages as they are, if each has a known role and a content that is not blank, else gptfast.Error."""
    if not isinstance(messages, list) or not messages:
        raise Error(f"messages are {shown(messages)}; a list of at least one object with role and content is needed")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise Error(f"message {number} is {shown(message)}; an object with role and content is needed")
        if message.get("role") not in ROLES:
            raise Error(f"message {number} has the role {shown(message.get('role'))}; allowed: {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise Error(f"message {number} has the content {shown(content)}; a text that is not empty is needed")
    return messages


def _segments(messages: Sequence[Mapping[str, str]], form: Template) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, and whether the assistant says them. No token crosses a border between two: GPT-2's
    pattern, which splits text before pairs are merged, ends a piece at each of them."""
    space = form.lead if form.lead == " " else ""  # a space belongs to the word behind it
    pieces = []
    for message in messages:
        speaks = message["role"] == "assistant"
        pieces += [
            (form.heads[message["role"]] + form.lead.removeprefix(space), False),
            (space + message["content"].strip(), speaks),
            (form.end, False),
        ]
    return pieces


def _opening(form: Template) -> str:
    """What the assistant's answer follows."""
    return form.heads["assistant"] + (form.lead if form.lead != " " else "")


def render(messages: Sequence[Mapping[str, str]], template: Template | str, generation_prompt: bool = True) -> str:
    """The conversation as text; with generation_prompt up to where the assistant's next answer begins (strip() the answer).

    Contents are stripped of surrounding white space. Raises gptfast.Error for messages that check() refuses.
    """
    return _text(check(list(messages)), _form(template), generation_prompt)


def _text(messages: Sequence[Mapping[str, str]], form: Template, generation_prompt: bool) -> str:
    return "".join(piece for piece, _ in _segments(messages, form)) + (_opening(form) if generation_prompt else "")


def stop_strings(template: Template | str) -> list[str]:
    """Where an answer ends at the latest, if the model does not end it with <|endoftext|>: where it begins another turn."""
    form = _form(template)
    return [form.end + head for head in form.heads.values()]


def recorded(folder: str | Path) -> str | None:
    """The name of the template that a model's folder was fine-tuned with; None where it was not fine-tuned for dialogue."""
    from gptfast import tasks

    task = tasks.recorded(folder)
    return task.template if isinstance(task, Dialogue) else None


@dataclass(frozen=True, kw_only=True)
class Conversation(Example):
    """messages: [{"role", "content"}]."""

    messages: list[dict[str, str]]


@dataclass
class Dialogue(Task):
    """.jsonl lines {"messages": [{"role", "content"}, ...]}."""

    name: ClassVar[str] = "dialogue"
    columns: ClassVar[tuple[str, ...]] = ()

    template: str = option("plain", "how a conversation is written down", choices=tuple(TEMPLATES))
    answer_tokens: int = option(64, "longest answer of the assistant in tokens", low=1)

    def parse(self, record: Record, labelled: bool = True) -> Conversation:
        """Raises gptfast.LoadError for what is no conversation, and with labelled for one in which the assistant says nothing."""
        try:
            messages = check(record.values.get("messages"))
        except Error as error:
            raise record.error(str(error)) from None
        if labelled and not any(message["role"] == "assistant" for message in messages):
            raise record.error("the assistant says nothing; there is nothing to learn")
        return Conversation(line=record.line, messages=messages)

    def example(self, text: str) -> Conversation:
        """One question of the user."""
        return Conversation(messages=check([{"role": "user", "content": text}]))

    def encode(self, example: Conversation, tokenizer: GPT2Tokenizer, context: int) -> Encoded:
        """Of a conversation that is too long the end is cut off; raises gptfast.Error where no answer is left."""
        if tokenizer.eos_token_id is None:
            raise Error("the tokenizer has no <|endoftext|>, which ends an answer")
        ids: list[int] = []
        targets: list[int] = []
        for text, speaks in _segments(example.messages, _form(self.template)):
            piece = tokenizer.encode(text)
            if speaks:  # the token before predicts the first one, and the last one predicts the end
                targets[-1] = piece[0]
                targets += [*piece[1:], tokenizer.eos_token_id]
            else:
                targets += [IGNORED] * len(piece)
            ids += piece
        if all(target == IGNORED for target in targets[:context]):
            raise Error(f"no answer within the first {context:,} tokens, the model's context")
        return Encoded(ids[:context], targets[:context])

    def answer(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Conversation]) -> list[dict[str, Any]]:
        """The assistant's next turn after each conversation, greedily; one at the end of a conversation that was given is left out
        of the prompt and stands beside the answer as "reference"."""
        prompts, references = [], []
        for example in examples:
            closed = example.messages[-1]["role"] == "assistant"
            references.append(example.messages[-1]["content"].strip() if closed else None)
            before = example.messages[:-1] if closed else example.messages
            prompts.append(tokenizer.encode(_text(before, _form(self.template), True)))
        made = texts(tokenizer, continuations(model, prompts, self.answer_tokens), stop_strings(self.template))
        return [
            {"answer": text} | ({} if reference is None else {"reference": reference})
            for text, reference in zip(made, references, strict=True)
        ]

    def measure(self, model: Any, tokenizer: GPT2Tokenizer, examples: Sequence[Conversation]) -> dict[str, Any]:
        """Of the assistant's turns: loss (nats a token, the ends counted), perplexity, tokens, and conversations."""
        total, count = target_loss(model, [self.encode(e, tokenizer, model.config.n_positions) for e in examples])
        return {
            "conversations": len(examples), "tokens": count, "loss": total / count,
            "perplexity": math.exp(min(total / count, 700.0)),
        }  # fmt: skip
