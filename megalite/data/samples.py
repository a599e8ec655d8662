"""Samples of one corpus: S tokens, and the next one if it is predicted (`ahead` 1; in masked language modelling 0),
cut at multiples of S from the concatenated tokens.

S sequence length in tokens, B samples of a batch. There are two orders: here, the windows of the file in order, or in a
new permutation each epoch that is computed for the requested position, so that starting takes the same time for any
size; and in `megatron.py` Megatron-LM's order, whose tables are built first.
`blend.py` chooses the corpus for each position of the run.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megalite.data.indexed import IndexedCorpus
from megalite.data.permutation import mixed, permuted
from megalite.errors import DataError

Piece = tuple[int, int]  # tokens [start, stop) of a corpus


BLOCK, KEPT_BLOCKS = 1024, 4
"""Positions that are shuffled at a time, and the number of such blocks that are cached."""


class Samples(Protocol):
    """The loader's interface to a corpus: the pieces that make up each sample, S + ahead tokens in all."""

    @property
    def corpus(self) -> IndexedCorpus: ...

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """The pieces of the samples at these positions of the corpus's own order, in reading order."""
        ...


class Finite(Samples, Protocol):
    """A finite number of samples, at positions below `num_samples`."""

    @property
    def num_samples(self) -> int: ...


def part_of(count: int, split: Sequence[float] | None) -> range:
    """The sequences, of `count`, in a part given as [from, to] shares, rounded as in Megatron's --split."""
    first, stop = (round(share * float(count)) for share in split or (0.0, 1.0))
    return range(first, stop)


class Windows:
    """The windows of a corpus in its own order: window i has tokens [i·S, i·S + S + ahead) of the corpus, or of the
    part of it that is used; a partial last window is dropped."""

    def __init__(
        self,
        corpus: IndexedCorpus,
        sequence_length: int,
        split: Sequence[float] | None = None,
        ahead: int = 1,
    ) -> None:
        """Raises DataError if the corpus is shorter than one window."""
        self.corpus, self.length, self.ahead = corpus, sequence_length, ahead
        sequences = part_of(corpus.num_sequences, split)
        self._first = corpus.sequence_start(sequences.start)
        tokens = corpus.sequence_start(sequences.stop) - self._first
        self.num_samples = (tokens - ahead) // sequence_length
        if self.num_samples < 1:
            raise DataError(
                f"{corpus.tokens_path}: has {tokens} tokens{'' if split is None else f' in the split {split}'}: must "
                f"have at least megalite.data.sequence_length {sequence_length}{' + 1' if ahead else ''}"
            )

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """See Samples; positions are window numbers."""
        starts = (self._first + positions * self.length).tolist()
        return [[(start, start + self.length + self.ahead)] for start in starts]

    def edges(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and after the starts of at most `most` windows, spread evenly over all but the first."""
        count = min(most, self.num_samples - 1)
        windows = np.linspace(1, self.num_samples - 1, count).astype(np.int64)
        starts = (self._first + windows * self.length).tolist()
        found = [self.corpus.read(start - 1, start + 1) for start in starts]
        both = np.array(found, np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]


class Shuffled:
    """An endless shuffled order of samples: each epoch takes every sample once, in a new order."""

    def __init__(self, samples: Finite, seed: int, stream: int) -> None:
        """stream: number of the corpus in the run, so that two corpora of the same size get different orders."""
        self.corpus, self._samples = samples.corpus, samples
        self._seed, self._stream = seed, stream
        self._blocks: dict[int, np.ndarray] = {}

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """See Samples; every position from 0 takes the same time."""
        blocks = positions // BLOCK
        chosen = np.empty_like(positions)
        for block in set(blocks.tolist()):
            here = blocks == block
            chosen[here] = self._block(block)[positions[here] - block * BLOCK]
        return self._samples.pieces(chosen)

    def _block(self, block: int) -> np.ndarray:
        """The samples at positions [block · BLOCK, (block + 1) · BLOCK). Shuffling a few positions takes as long as
        shuffling a thousand, and a run reads neighbouring positions, so the newest blocks are cached."""
        if block not in self._blocks:
            if len(self._blocks) == KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = self._shuffled(np.arange(block * BLOCK, (block + 1) * BLOCK))
        return self._blocks[block]

    def _shuffled(self, positions: np.ndarray) -> np.ndarray:
        size = self._samples.num_samples
        epochs, inside = positions // size, positions % size
        chosen = np.empty_like(inside)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = permuted(inside[here], size, mixed(self._seed, self._stream, epoch))
        return chosen


def read_tokens(corpus: IndexedCorpus, sample: list[Piece], row: np.ndarray) -> None:
    """Copies the pieces of a sample one after another into `row` int64 [S + ahead]."""
    filled = 0
    for start, stop in sample:
        row[filled : filled + stop - start] = corpus.read(start, stop)
        filled += stop - start


def read_documents(corpus: IndexedCorpus, sample: list[Piece], row: np.ndarray) -> None:
    """Numbers the documents of a sample from 0 in `row` int32 [S + ahead]. Each piece begins a new document."""
    row[:] = 0
    filled = 0
    for start, stop in sample:
        if filled:
            row[filled] = 1
        for first in corpus.document_starts(start, stop):
            row[filled + first - start] = 1
        filled += stop - start
    np.cumsum(row, out=row)
