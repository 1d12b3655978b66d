"""A sorted array of levels whose consecutive versions share unchanged parts.

It is split into leaves of about LEAF_LEVELS levels, which are immutable. A new version has new leaves where levels
changed and the old leaves elsewhere, like a copy-on-write B-tree. So several versions of millions of levels take
little more memory than one. What a level means belongs in `book_state`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

__all__ = ["LEAF_LEVELS", "PACKED", "PACKED_BYTES", "SortedLevels"]

PACKED = pl.Schema({"level": pl.Int64, "size": pl.Int64})
PACKED_BYTES = 16
LEAF_LEVELS = 1 << 16
"""Of a leaf at most. Two neighbours have more together, so that there are few."""

_Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SortedLevels:
    """Levels in ascending order with their sizes. Positions count from the first level, over all leaves."""

    leaves: tuple[pl.DataFrame, ...] = ()
    """None is empty; each is in memory of its own, not a slice of another one."""

    @classmethod
    def of(cls, levels: pl.DataFrame) -> SortedLevels:
        """Levels that are sorted."""
        return cls(tuple(_leaves([levels])))

    @cached_property
    def height(self) -> int:
        """The number of levels."""
        return int(self._ends[-1]) if self.leaves else 0

    def find(self, levels: _Numbers) -> _Numbers:
        """The position of each of these ascending levels: where it is or would be inserted."""
        if not self.leaves:
            return np.zeros(len(levels), np.int64)
        positions = [
            begin + np.searchsorted(leaf, part) for leaf, begin, part in self._beside(levels)
        ]
        return np.concatenate([np.empty(0, np.int64), *positions])

    def has(self, levels: _Numbers) -> _Numbers:
        """The positions of the existing ones among these ascending levels."""
        positions = [np.empty(0, np.int64)]
        for leaf, begin, part in self._beside(levels):
            at = np.searchsorted(leaf, part)
            exists = leaf[np.minimum(at, len(leaf) - 1)] == part
            positions.append(begin + at[exists])
        return np.concatenate(positions)

    def take(self, positions: _Numbers) -> pl.DataFrame:
        """The levels at these ascending positions."""
        spans = _spans(np.searchsorted(positions, self._ends[:-1]), len(positions))
        begins = [0, *self._ends.tolist()]
        parts = [
            leaf[positions[begin:end] - first]
            for leaf, first, (begin, end) in zip(self.leaves, begins, spans, strict=False)
            if begin < end
        ]
        return pl.concat(parts) if parts else pl.DataFrame(schema=PACKED)

    def parts(self, changes: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """The levels of each leaf with those of the changes, which are sorted, that are in its place.

        A change of size 0 takes a level away.
        """
        if not self.leaves:
            yield changes.filter(pl.col("size") != 0)
            return
        spans = _spans(np.searchsorted(changes["level"].to_numpy(), self._firsts[1:]), len(changes))
        for leaf, (begin, end) in zip(self.leaves, spans, strict=True):
            yield _changed(leaf, changes.slice(begin, end - begin)) if begin < end else leaf

    def changed(self, changes: pl.DataFrame) -> SortedLevels:
        """The levels after changes, which are sorted; leaves that have none of them are shared."""
        return SortedLevels(tuple(_leaves(self.parts(changes))))

    @cached_property
    def _levels(self) -> tuple[_Numbers, ...]:
        return tuple(leaf["level"].to_numpy() for leaf in self.leaves)

    @cached_property
    def _firsts(self) -> _Numbers:
        return np.array([level[0] for level in self._levels], np.int64)

    @cached_property
    def _ends(self) -> _Numbers:
        return np.cumsum([leaf.height for leaf in self.leaves], dtype=np.int64)

    def _beside(self, levels: _Numbers) -> Iterator[tuple[_Numbers, int, _Numbers]]:
        """(a leaf's levels, the position of its first one, those of `levels` that are in its place)"""
        spans = _spans(np.searchsorted(levels, self._firsts[1:]), len(levels))
        begins = [0, *self._ends.tolist()]
        for leaf, first, (begin, end) in zip(self._levels, begins, spans, strict=False):
            if begin < end:
                yield leaf, first, levels[begin:end]


def _spans(cuts: _Numbers, end: int) -> Iterable[tuple[int, int]]:
    return itertools.pairwise([0, *cuts.tolist(), end])


def _changed(leaf: pl.DataFrame, changes: pl.DataFrame) -> pl.DataFrame:
    level = pl.col("level")
    unchanged = leaf.filter(~level.is_in(changes["level"].implode()))
    return unchanged.merge_sorted(changes.filter(pl.col("size") != 0), key="level").rechunk()


def _leaves(parts: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The parts as leaves: small neighbours joined, large ones cut; the others are the same objects."""
    waiting: pl.DataFrame | None = None
    for part in itertools.chain.from_iterable(map(_cut, parts)):
        if waiting is None or waiting.height + part.height > LEAF_LEVELS:
            if waiting is not None:
                yield waiting
            waiting = part
        else:
            waiting = pl.concat([waiting, part]).rechunk()
    if waiting is not None:
        yield waiting


def _cut(part: pl.DataFrame) -> Sequence[pl.DataFrame]:
    """A part in equal pieces of at most LEAF_LEVELS, each in memory of its own; none where it is empty."""
    count = -(-part.height // LEAF_LEVELS)
    if count <= 1:
        return [part] if count else []
    edges = np.linspace(0, part.height, count + 1).astype(int).tolist()
    return [part[np.arange(begin, end)] for begin, end in itertools.pairwise(edges)]
