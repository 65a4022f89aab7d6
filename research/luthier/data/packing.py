"""Which examples share a row: a plan over lengths, a pure function of (seed, epoch).

Best-fit decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830): examples in
order of falling length, each into the fullest row that still has room. Rows and examples are
shuffled by keys hashed from (seed, epoch, index), so a plan needs no state and is the same on
every machine and NumPy version.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from luthier.errors import LuthierError, near

PACKINGS = ("best_fit", "none")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of examples: row r holds `examples[offsets[r]:offsets[r + 1]]`, in that order."""

    examples: Int[np.ndarray, " examples"]
    offsets: Int[np.ndarray, " rows+1"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int[np.ndarray, " members"]:
        return self.examples[self.offsets[row] : self.offsets[row + 1]]


def plan(lengths: Int[np.ndarray, " examples"], *, seed: int, epoch: int, sequence_length: int, packing: str) -> Plan:
    """Places every example in exactly one row.

    Args:
      lengths: tokens of each example, 1 to `sequence_length`.
      seed, epoch: fix the order of examples of equal length, and of the rows.
      sequence_length: tokens that a row holds.
      packing: `best_fit`, or `none` for one example a row.
    """
    if packing not in PACKINGS:
        raise LuthierError(f"unknown packing {packing!r}", where="stage.packing", mend=near(packing, PACKINGS))
    order = permutation(len(lengths), seed, epoch, 0)
    if packing == "none":
        return Plan(order, np.arange(len(order) + 1))
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = _best_fit_decreasing(lengths[order], sequence_length)
    rows = int(row_of.max(initial=-1)) + 1
    place = np.empty(rows, np.int64)
    place[permutation(rows, seed, epoch, 1)] = np.arange(rows)
    row_of = place[row_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return Plan(order[np.argsort(row_of, kind="stable")], offsets)


def permutation(count: int, *keys: int) -> Int[np.ndarray, " count"]:
    """A permutation of `count` things that depends on `keys` alone."""
    key = np.zeros(1, np.uint64)
    for part in keys:
        key = _mixed(key + np.asarray([int(part) % (1 << 64)], np.uint64))
    return np.argsort(_mixed(np.arange(count, dtype=np.uint64) ^ key))  # no two are equal: any sort gives the same


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit integers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example; `lengths` must fall.

    Examples of one length are placed in bulk: the fullest rows with room for one take as many of
    them as fit, which is what placing them one by one does too.
    """
    row_of = np.empty(len(lengths), np.int64)
    waiting: dict[int, list[np.ndarray]] = {}  # room left → rows that have it
    rooms, rows, done = 0, 0, 0  # `rooms` has bit r set if a row with room r is waiting
    for length, count in _runs(lengths):
        while count:
            room = _lowest_bit(rooms >> length) + length if rooms >> length else capacity
            each = room // length
            if rooms >> length:
                rows_here, rest = _take(waiting[room], -(-count // each))
                waiting[room] = rest
                if not rest:
                    rooms &= ~(1 << room)
            else:
                rows_here = np.arange(rows, rows - (-count // each))
                rows += len(rows_here)
            placed = min(count, each * len(rows_here))
            row_of[done : done + placed] = np.repeat(rows_here, each)[:placed]
            full = placed // each
            for part, left in (
                (rows_here[:full], room - each * length),
                (rows_here[full:], room - (placed % each) * length),
            ):
                if len(part) and left:
                    waiting.setdefault(left, []).append(part)
                    rooms |= 1 << left
            done, count = done + placed, count - placed
    return row_of


def _runs(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for start, stop in zip(edges[:-1], edges[1:]):
        yield int(lengths[start]), int(stop - start)


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _take(parts: list[np.ndarray], count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The first `count` rows (or all there are), and the parts that remain."""
    taken = []
    while parts and count > 0:
        part, parts = parts[0], parts[1:]
        taken.append(part[:count])
        if len(part) > count:
            parts = [part[count:], *parts]
        count -= len(taken[-1])
    return np.concatenate(taken), parts
