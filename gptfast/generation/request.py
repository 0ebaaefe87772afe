"""What a scheduler is given, and what it keeps of it: a request, and each of its answers while it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gptfast.generation.rows import Row


@dataclass(eq=False)
class Answer:
    """One answer while it is made. `computed`: tokens of `ids` whose keys and values are in `pages`."""

    row: Row
    request: Request
    ids: list[int]  # prompt and what was drawn
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of full pages, as far as they were needed
    computed: int = 0
    published: int = 0

    @property
    def todo(self) -> int:
        """Tokens that are to be computed before the next draw."""
        return len(self.ids) - self.computed


@dataclass(eq=False)
class Request:
    """The answers to one prompt. `on_token(row)` is called after every change of a row, in the thread that steps."""

    rows: list[Row]
    on_token: Callable[[Row], None] | None = None
    cancelled: bool = False
    followers: list[Answer] = field(default_factory=list)  # answers that wait for the first one's prompt

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return all(row.finish_reason is not None for row in self.rows)
