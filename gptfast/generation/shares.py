"""The parts that sequences have in a step of the scheduler, and the batch that a runner is given for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gptfast.generation.request import Answer
from gptfast.generation.runner import Batch


@dataclass
class Share:
    """A sequence's part of a step: `count` tokens, `ahead` proposed ones behind them; forks draw from its last token too."""

    sequence: Answer
    count: int
    draws: bool  # its last token is among them
    ahead: list[int] = field(default_factory=list)
    forks: list[Answer] = field(default_factory=list)

    @property
    def single(self) -> bool:
        """Whether this is one token of an answer in the making."""
        return self.count == 1 and self.draws and not self.forks


def batch_of(shares: list[Share]) -> Batch:
    """What a runner is asked for."""
    batch = Batch()
    for share in shares:
        s = share.sequence
        new = [*s.ids[s.computed : s.computed + share.count], *share.ahead]
        batch.add(new, s.computed, s.pages, 1 + len(share.ahead) if share.draws else 0, s.row if share.draws else None)
        for fork in share.forks:
            batch.add([], len(fork.ids), fork.pages, 1, fork.row)
    return batch


def places_of(shares: list[Share]) -> Iterator[int]:
    """Where each sequence's draws begin among those of the step."""
    place = 0
    for share in shares:
        yield place
        place += (1 + len(share.ahead) if share.draws else 0) + len(share.forks)
