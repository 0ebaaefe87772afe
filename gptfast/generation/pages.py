"""Which page of a runner's cache belongs to whom: counted references, and full pages remembered by the text that led to them.

A page's key is a hash of the key before it and of its own 64 ids, so equal keys mean equal texts from the first token on, and equal
keys and values. Pages that nobody holds any more are kept while there is room, the least recently used ones leave first.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from gptfast.cache import PAGE


def chain(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a full page with these ids behind a page with the key `before` (b"" for the first page)."""
    return blake2b(array("q", ids).tobytes(), key=before, digest_size=16).digest()


class PagePool:
    """`pages` pages, numbered from 0; at most `idle` (default: all) of them are kept for their text when nobody holds them.

    Low numbers are given out first, so that memory which is taken on first use stays small.
    """

    def __init__(self, pages: int, idle: int | None = None) -> None:
        self.pages, self.most_idle = pages, pages if idle is None else idle
        self._uses = [0] * pages
        self._free = list(range(pages))  # a heap
        self._keys: list[bytes | None] = [None] * pages
        self._known: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """How many take() can give."""
        return len(self._free) + len(self._idle)

    def take(self) -> int | None:
        """A page of one's own with undefined content; None where every page is held."""
        if self._free:
            page = heapq.heappop(self._free)
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._uses[page] = 1
        return page

    def hold(self, page: int) -> int:
        """One more holder of a page that somebody holds or that is kept; returns it."""
        self._idle.pop(page, None)
        self._uses[page] += 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer of each. Of one text's pages the last ones leave the memory first: they need those before them."""
        for page in reversed(pages):
            self._uses[page] -= 1
            if self._uses[page] == 0:
                if self._keys[page] is None:
                    heapq.heappush(self._free, page)
                else:
                    self._idle[page] = None
        while len(self._idle) > self.most_idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            heapq.heappush(self._free, page)

    def publish(self, page: int, key: bytes) -> None:
        """A held page is full, and its key is `key`: others may use it. Nothing where another page has that key."""
        if key not in self._known:
            self._known[key], self._keys[page] = page, key

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody else finds these held pages any more: their content failed."""
        for page in pages:
            self._forget(page)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest known beginning of a text with these keys, each held once more."""
        found = []
        for key in keys:
            page = self._known.get(key)
            if page is None:
                break
            found.append(self.hold(page))
        return found

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._known[key]
            self._keys[page] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the holders are exactly `tables` and every page is held, kept or free, in one of these."""
        held = Counter(page for table in tables for page in table)
        assert [held[page] for page in range(self.pages)] == self._uses, "pages are held by others than said"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and len(idle) <= self.most_idle
        places = [(use > 0) + (page in free) + (page in idle) for page, use in enumerate(self._uses)]
        assert places == [1] * self.pages, "a page is in two places or in none"
        assert {key: page for page, key in enumerate(self._keys) if key is not None} == self._known
        assert all(self._keys[page] is not None for page in idle) and all(self._keys[page] is None for page in free)


def keys_of(ids: Sequence[int], known: list[bytes], count: int) -> list[bytes]:
    """Extends `known`, the keys of a text's first pages, to `count` pages, and returns it."""
    while len(known) < count:
        begin = PAGE * len(known)
        known.append(chain(known[-1] if known else b"", ids[begin : begin + PAGE]))
    return known
