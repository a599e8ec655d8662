"""Chooses the corpus for each position of a run, such that the shares hold at every prefix of the run.

Let corpus i have the share w_i. Among the first n positions it must have more than n·w_i - 1 and fewer than
n·w_i + 1 samples. So its j-th sample must be at a position from floor((j-1)/w_i) to ceil(j/w_i): a time window.
Choosing at each position the open window that closes first ("earliest deadline first") meets all windows
(Baruah et al., Proportionate progress, 1996). Megatron's rule, which chooses the corpus that is furthest behind,
violates the bound with many corpora. Both rules have to step through all positions.

To start anywhere in constant time, the positions are cut into blocks. At the start of a block, a sample whose window
is open there may or may not have been taken already; `_counts_at` decides that from the position alone: the most
urgent ones have been taken, as far as there is room for them among the positions before. By Hall's theorem on
intervals, every block can then be filled from its own start to the start of the next one, within all windows.
Shares are exact fractions of integers.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_LEAST_BLOCK = 4096
# Shares are rounded to 1 / 2^40 at the finest: an error under 0.01 sample in 10^10.
_FINEST = 1 << 40


class Blend:
    """Maps positions of a run to (corpus, number of samples that it has given before)."""

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: of the corpora, above 0; interpreted as the decimals that they are written as. The length of a block
        is about 2 / the smallest share, so config/data_rules.py limits that share."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        # w_i = parts[i] / total.
        self._parts, self._total = _integers([weight / sum(exact) for weight in exact])
        self._block = max(_LEAST_BLOCK, 2 * math.ceil(self._total / min(self._parts)) + 2)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def shares(self) -> list[float]:
        """The configured share of each corpus; they sum to 1."""
        return [part / self._total for part in self._parts]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, position in that corpus's own order), int64 [B] each, for positions int64 [B]."""
        if len(self._parts) == 1:
            return np.zeros_like(positions), positions
        corpora, numbers = np.empty_like(positions), np.empty_like(positions)
        blocks = positions // self._block
        for block in np.unique(blocks).tolist():
            here = blocks == block
            inside = positions[here] - block * self._block
            of_block = self._walked(block)
            corpora[here], numbers[here] = of_block[0][inside], of_block[1][inside]
        return corpora, numbers

    def counts(self, position: int) -> list[int]:
        """Number of samples from each corpus among the first `position` positions."""
        if len(self._parts) == 1:
            return [position]
        block, inside = divmod(position, self._block)
        before = self._counts_at(block * self._block)
        since = np.bincount(self._walked(block)[0][:inside], minlength=len(self._parts)).tolist()
        return [count + more for count, more in zip(before, since, strict=True)]

    def _walked(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The corpora of a block, and the numbers of the samples in them. The last two blocks are cached, since a batch
        may span two."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = self._walk(block * self._block)
        return self._blocks[block]

    def _walk(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Fills positions [start, start + block), earliest deadline first."""
        parts, total = self._parts, self._total
        given, goal = self._counts_at(start), self._counts_at(start + self._block)
        closed = [
            (count * total // part, i)
            for i, (count, part) in enumerate(zip(given, parts, strict=True))
        ]
        closed = [entry for entry in closed if given[entry[1]] < goal[entry[1]]]
        heapq.heapify(closed)  # (position at which the corpus's next window opens, corpus)
        opened: list[tuple[int, int]] = []  # (position at which the window closes, corpus)
        corpora, numbers = np.empty(self._block, np.int64), np.empty(self._block, np.int64)
        for inside in range(self._block):
            while closed and closed[0][0] <= start + inside:
                _, i = heapq.heappop(closed)
                heapq.heappush(opened, (-(-(given[i] + 1) * total // parts[i]), i))
            _, i = heapq.heappop(opened)
            corpora[inside], numbers[inside] = i, given[i]
            given[i] += 1
            if given[i] < goal[i]:
                heapq.heappush(closed, (given[i] * total // parts[i], i))
        return corpora, numbers

    def _counts_at(self, base: int) -> list[int]:
        """Number of samples from each corpus among the first `base` positions, a multiple of the block.

        It is floor(base·w_i), plus one for the corpora whose open window closes soonest, as room allows: for every u,
        the samples whose windows lie within the last u positions, and those taken early whose windows opened within
        them, must be at most u.
        """
        parts, total = self._parts, self._total
        counts = [base * part // total for part in parts]
        left = [base * part % total for part in parts]
        fractional = [i for i in range(len(parts)) if left[i]]
        if not fractional:
            return counts
        opens = {i: counts[i] * total // parts[i] for i in fractional}
        closes = {i: -(-(counts[i] + 1) * total // parts[i]) for i in fractional}
        back = np.arange(1, base - min(opens.values()) + 1)  # u: number of positions before base
        room = back.copy()
        for part, rest in zip(parts, left, strict=True):
            # Windows entirely within the last u.
            room -= np.maximum(0, (back * part - rest) // total)
        surplus = base - sum(counts)
        for i in sorted(fractional, key=lambda i: (closes[i], i)):
            # Index of the smallest u that includes this window's opening.
            first = base - opens[i] - 1
            if surplus and room[first:].min() >= 1:
                room[first:] -= 1
                counts[i] += 1
                surplus -= 1
        assert surplus == 0, "no more open windows than positions"
        return counts


def _integers(shares: list[Fraction]) -> tuple[list[int], int]:
    """Shares as integers over their sum; rounded only if the denominator would exceed _FINEST."""
    total = math.lcm(*(share.denominator for share in shares))
    if total > _FINEST:
        parts = [round(share * _FINEST) for share in shares]
    else:
        parts = [int(share * total) for share in shares]
    divisor = math.gcd(*parts)
    return [part // divisor for part in parts], sum(parts) // divisor
