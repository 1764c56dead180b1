"""Which pages of 16 tokens the rows of a KV cache hold. Pages that rows have in common are held once.

A page belongs to as many rows as hold it; whoever writes into a shared page gets a copy of its own first. Bookkeeping only:
backends keep the numbers, and say how a page is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ming_app.engine.types import CacheFullError

PAGE = 16
"""tokens per page"""


class PagedCache:
    """`engine.types.Cache` of B rows over a bounded number of pages."""

    def __init__(self, batch: int, capacity: int, tokens: int | None = None):
        """`tokens`: what all rows together may hold, whole pages; None: all of them full."""
        per_row = -(-capacity // PAGE)
        self.capacity = capacity
        self.lengths = np.zeros(batch, np.int64)
        self.tables = np.full((batch, per_row), -1, np.int64)
        """int64 [B, n]: pages of every row, in order"""
        self.pages = batch * per_row if tokens is None else max(1, -(-tokens // PAGE))
        self._held = np.zeros(batch, np.int64)  # pages per row; more than its tokens need after a forward that failed
        self._holders = np.zeros(self.pages, np.int64)
        self._free = list(range(self.pages - 1, -1, -1))

    def copy_page(self, source: int, target: int) -> None:
        """Copies the keys and values of all layers from page to page."""
        raise NotImplementedError

    @property
    def free_tokens(self) -> int:
        """Tokens for which pages are free."""
        return len(self._free) * PAGE

    def needed(self, row: int, tokens: int) -> int:
        """Pages that so many more tokens of a row take, copies of shared ones counted."""
        length = int(self.lengths[row])
        more = -(-(length + tokens) // PAGE) - int(self._held[row])
        copied = tokens > 0 and length % PAGE and self._holders[self.tables[row, length // PAGE]] > 1
        return max(more, 0) + bool(copied)

    def fits(self, rows: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether there are pages for so many more tokens of these rows."""
        return sum(self.needed(row, count) for row, count in zip(rows, counts, strict=True)) <= len(self._free)

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the first `length` tokens of a row. Raises ValueError when it holds fewer."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} holds {self.lengths[row]} tokens, cannot keep {length}")
        keep = -(-length // PAGE)
        for index in range(keep, int(self._held[row])):
            self._release(int(self.tables[row, index]))
            self.tables[row, index] = -1
        self._held[row] = min(keep, int(self._held[row]))
        self.lengths[row] = length

    def share(self, source: int, target: int, length: int) -> int:
        """Gives the empty row `target` the first tokens of `source`, whole pages only; how many it now holds."""
        if self._held[target]:
            raise ValueError(f"row {target} is not empty")
        pages = min(length, int(self.lengths[source])) // PAGE
        self.tables[target, :pages] = self.tables[source, :pages]
        self._holders[self.tables[target, :pages]] += 1
        self._held[target], self.lengths[target] = pages, pages * PAGE
        return pages * PAGE

    def reserve(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Pages for `counts[i]` more tokens of `rows[i]`, to be written now. Raises ValueError beyond the capacity and
        CacheFullError when the pool has too few; nothing has changed then."""
        for row, count in zip(rows, counts, strict=True):
            if self.lengths[row] + count > self.capacity:
                raise ValueError(
                    f"row {row}: {self.lengths[row]} tokens and {count} more exceed the capacity of {self.capacity}"
                )
        if not self.fits(rows.tolist(), counts.tolist()):
            raise CacheFullError(
                f"The conversations in memory have reached their limit of {self.pages * PAGE} tokens.",
                f"内存中的对话已达到 {self.pages * PAGE} 个词元的上限。",
            )
        for row, count in zip(rows, counts, strict=True):
            length = int(self.lengths[row])
            last = int(self.tables[row, length // PAGE]) if length % PAGE else -1
            if last >= 0 and self._holders[last] > 1:
                own = self._take()
                self.copy_page(last, own)
                self._release(last)
                self.tables[row, length // PAGE] = own
            for index in range(int(self._held[row]), -(-(length + int(count)) // PAGE)):
                self.tables[row, index] = self._take()
                self._held[row] += 1

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
