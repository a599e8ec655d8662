"""Samples of one corpus: S tokens, and the one after them where it is predicted (`ahead` 1; masked language modelling
has 0), taken at multiples of S from the tokens laid end to end.

S sequence length in tokens, B samples of a batch. Two orders: the windows of the file itself, in order or
in a new permutation each epoch, computed at the requested position, so that a start costs the same at any size
(here); and Megatron-LM's, whose tables are built first (`megatron.py`).
Which corpus a position of the run goes to is `blend.py`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megalite.data.indexed import IndexedCorpus
from megalite.data.permutation import mixed, permuted
from megalite.errors import DataError

Piece = tuple[int, int]  # tokens [start, stop) of a corpus


BLOCK, KEPT_BLOCKS = 1024, 4
"""Positions that are shuffled at once, and how many such blocks are kept."""


class Samples(Protocol):
    """What a corpus offers to the loader: the pieces that each sample is made of, S + ahead tokens in all."""

    @property
    def corpus(self) -> IndexedCorpus: ...

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """The pieces of the samples at these positions of the corpus's own order, in the order read."""
        ...


class Finite(Samples, Protocol):
    """Samples of which there is a number, at positions below it."""

    @property
    def num_samples(self) -> int: ...


def part_of(count: int, split: Sequence[float] | None) -> range:
    """Which of `count` sequences are in a part given by shares, rounded as Megatron rounds its --split."""
    first, stop = (round(share * float(count)) for share in split or (0.0, 1.0))
    return range(first, stop)


class Windows:
    """The windows of a corpus in its own order: window i holds tokens [i·S, i·S + S + ahead) of the corpus, or of the
    part of it that is used; a partial last one is dropped."""

    def __init__(
        self,
        corpus: IndexedCorpus,
        sequence_length: int,
        split: Sequence[float] | None = None,
        ahead: int = 1,
    ) -> None:
        """Raises DataError where the corpus does not fill one window."""
        self.corpus, self.length, self.ahead = corpus, sequence_length, ahead
        sequences = part_of(corpus.num_sequences, split)
        self._first = corpus.sequence_start(sequences.start)
        tokens = corpus.sequence_start(sequences.stop) - self._first
        self.num_samples = (tokens - ahead) // sequence_length
        if self.num_samples < 1:
            raise DataError(
                f"{corpus.tokens_path}: holds {tokens} tokens{'' if split is None else f' in the split {split}'}: a "
                f"sample needs {sequence_length}{' + 1' if ahead else ''}, by megalite.data.sequence_length"
            )

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """See Samples; positions are window numbers."""
        starts = (self._first + positions * self.length).tolist()
        return [[(start, start + self.length + self.ahead)] for start in starts]

    def edges(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and after the starts of `most` windows at most, spread over all but the first."""
        count = min(most, self.num_samples - 1)
        windows = np.linspace(1, self.num_samples - 1, count).astype(np.int64)
        starts = (self._first + windows * self.length).tolist()
        found = [self.corpus.read(start - 1, start + 1) for start in starts]
        both = np.array(found, np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]


class Shuffled:
    """Samples that come in an order of their own, without end: each epoch takes every one once, in a new order."""

    def __init__(self, samples: Finite, seed: int, stream: int) -> None:
        """`stream` tells corpora of one run apart: two of one size get different orders."""
        self.corpus, self._samples = samples.corpus, samples
        self._seed, self._stream = seed, stream
        self._blocks: dict[int, np.ndarray] = {}

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """See Samples; any position from 0 on, at the same cost."""
        blocks = positions // BLOCK
        chosen = np.empty_like(positions)
        for block in set(blocks.tolist()):
            here = blocks == block
            chosen[here] = self._block(block)[positions[here] - block * BLOCK]
        return self._samples.pieces(chosen)

    def _block(self, block: int) -> np.ndarray:
        """The samples at positions [block · BLOCK, (block + 1) · BLOCK). A shuffle of a few positions costs as much as
        one of a thousand, and a run reads neighbours, so the newest blocks are kept."""
        if block not in self._blocks:
            if len(self._blocks) == KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block] = self._shuffled(np.arange(block * BLOCK, (block + 1) * BLOCK))
        return self._blocks[block]

    def _shuffled(self, positions: np.ndarray) -> np.ndarray:
        size = self._samples.num_samples
        epochs, places = positions // size, positions % size
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = permuted(places[here], size, mixed(self._seed, self._stream, epoch))
        return chosen


def read_tokens(corpus: IndexedCorpus, sample: list[Piece], row: np.ndarray) -> None:
    """Copy the pieces of a sample one after another into `row` int64 [S + 1]."""
    filled = 0
    for start, stop in sample:
        row[filled : filled + stop - start] = corpus.read(start, stop)
        filled += stop - start


def read_documents(corpus: IndexedCorpus, sample: list[Piece], row: np.ndarray) -> None:
    """Number the documents of a sample from 0 in `row` int32 [S + 1]. A new piece is a new document."""
    row[:] = 0
    filled = 0
    for start, stop in sample:
        if filled:
            row[filled] = 1
        for place in corpus.document_starts(start, stop):
            row[filled + place - start] = 1
        filled += stop - start
    np.cumsum(row, out=row)
