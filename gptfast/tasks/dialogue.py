"""Dialogue: turns of a system, a user and an assistant as plain text, by templates with a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptfast.errors import Error, shown


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


def render(messages: Sequence[Mapping[str, str]], template: str, generation_prompt: bool = True) -> str:
    """The conversation as text; with generation_prompt up to where the assistant's next answer begins."""
    form = TEMPLATES[template]
    for number, message in enumerate(messages, 1):
        if message["role"] not in form.heads or not message["content"].strip():
            raise Error(f"message {number} is {shown(message)}; a known role and a content that is not empty are needed")
    text = "".join(f"{form.heads[m['role']]}{form.lead}{m['content'].strip()}{form.end}" for m in messages)
    return text + (f"{form.heads['assistant']}{form.lead}".rstrip(" ") if generation_prompt else "")


def stop_strings(template: str) -> list[str]:
    """Where an answer ends at the latest: where it begins another turn."""
    form = TEMPLATES[template]
    return [form.end + head for head in form.heads.values()]


def recorded(folder: str | Path) -> str | None:
    """The name of the template that a model's folder was fine-tuned with; None where it was not fine-tuned for dialogue."""
    return None
