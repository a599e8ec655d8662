"""Exactly Megatron-LM's order of samples, for runs that are moved over from it.

It is built as in megatron-core's GPTDataset (`gpt_dataset.py`, `helpers.cpp`, 0.16.1), with NumPy's legacy generator
`RandomState(seed)`: the document index (all sequences once per epoch, shuffled over all epochs), the sample index
(where in it each sample begins) and the shuffle index (the order of samples). If less than 80 % of the last epoch is
needed, it is shuffled separately. All indices depend on the number of samples that the run was started for; tables
and start-up time grow with the corpus (`samples.py` has an order without tables). Megatron's compiled helper is not
needed: the entries of its table are computed here on demand.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalite.data.indexed import IndexedCorpus
from megalite.data.samples import Piece
from megalite.errors import DataError

_LEAST_LAST_EPOCH = 0.80  # share of the last epoch's samples below which it is shuffled separately
# Megatron-LM's mid_level_dataset_surplus: extra samples built for each corpus of a blend, as a share.
_SURPLUS = 0.005
_STRIDE = 64  # documents between two stored sums
_CHUNK = _STRIDE << 10  # documents summed at a time


class MegatronSamples:
    """Samples of one corpus in Megatron's order; `num_samples` is at least the requested number."""

    def __init__(
        self, corpus: IndexedCorpus, sequences: range, sequence_length: int, samples: int, seed: int
    ) -> None:
        """sequences: of the corpus, to use; samples: number of samples needed. Raises DataError if the sequences have
        no tokens."""
        self.corpus = corpus
        # A copy, because the memory map of the file is not aligned.
        sizes = np.array(corpus.sizes[sequences.start : sequences.stop])
        epoch_tokens = int(sizes.sum(dtype=np.int64))
        if epoch_tokens == 0:
            raise DataError(
                f"{corpus.index_path}: sequences {sequences.start} to {sequences.stop} have no tokens"
            )
        epochs = -(-(samples * sequence_length + 1) // epoch_tokens)
        # Samples of all epochs but the last.
        before_last = ((epochs - 1) * epoch_tokens - 1) // sequence_length
        least = int(_LEAST_LAST_EPOCH * ((epoch_tokens - 1) // sequence_length))
        apart = epochs > 1 and samples - before_last < least
        self.num_samples = (epochs * epoch_tokens - 1) // sequence_length
        random = np.random.RandomState(seed)
        self.document_index = document_index(len(sizes), epochs, apart, random)
        self.sample_index = SampleIndex(sizes, self.document_index, sequence_length)
        first = before_last if apart else self.num_samples
        self.shuffle_index = shuffle_index(first, self.num_samples, random)
        self._first_sequence = sequences.start

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """See samples.Samples; positions below `num_samples`. Each piece is a sequence or a part of one."""
        chosen = self.shuffle_index[positions].astype(np.int64)
        ends = [
            column.tolist()
            for at in (chosen, chosen + 1)
            for column in self.sample_index.begins(at)
        ]
        return [self._pieces(*sample) for sample in zip(*ends, strict=True)]

    def _pieces(self, first: int, first_offset: int, last: int, last_offset: int) -> list[Piece]:
        pieces = []
        for index, sequence in enumerate(self.document_index[first : last + 1].tolist(), first):
            sequence += self._first_sequence
            start = self.corpus.sequence_start(sequence)
            stop = start + (last_offset + 1 if index == last else int(self.corpus.sizes[sequence]))
            start += first_offset if index == first else 0
            if stop > start:
                pieces.append((start, stop))
        return pieces


def document_index(
    sequences: int, epochs: int, apart: bool, random: np.random.RandomState
) -> np.ndarray:
    """The sequences of all epochs in their order, int32. apart: whether the last epoch is shuffled separately."""
    parts = [epochs - 1, 1] if apart else [epochs]
    shuffled = [np.tile(np.arange(sequences, dtype=np.int32), part) for part in parts]
    for part in shuffled:
        random.shuffle(part)
    return shuffled[0] if len(shuffled) == 1 else np.concatenate(shuffled)


class SampleIndex:
    """Where each sample begins. Sample k begins at token k·S of the concatenated documents, so the entries of the table
    that Megatron's helper builds follow from cumulative sizes, which are stored here for every 64th document."""

    def __init__(self, sizes: np.ndarray, documents: np.ndarray, sequence_length: int) -> None:
        """sizes int32: of the sequences; documents int32: their order over the epochs."""
        self._sizes, self._documents, self._length = sizes, documents, sequence_length
        whole = len(documents) - len(documents) % _STRIDE
        sums = [
            sizes[documents[start : min(start + _CHUNK, whole)]]
            .reshape(-1, _STRIDE)
            .sum(axis=1, dtype=np.int64)
            for start in range(0, whole, _CHUNK)
        ]
        # Tokens before each 64th document.
        self._ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *sums]))

    def begins(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index in `documents`, token in that document), int64 [B] each, for samples [B]."""
        tokens = samples.astype(np.int64) * self._length
        blocks = np.searchsorted(self._ends, tokens, "right") - 1
        entries = blocks[:, None] * _STRIDE + np.arange(_STRIDE)  # [B, 64]
        sizes = self._sizes[self._documents[np.minimum(entries, len(self._documents) - 1)]]
        ends = self._ends[blocks, None] + np.cumsum(sizes, axis=1, dtype=np.int64)
        inside = np.argmax(ends > tokens[:, None], axis=1)
        rows = np.arange(len(samples))
        return entries[rows, inside], tokens - (ends[rows, inside] - sizes[rows, inside])


def shuffle_index(first: int, total: int, random: np.random.RandomState) -> np.ndarray:
    """The order of `total` samples; the first `first` and the rest are shuffled separately."""
    dtype: Any = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    result = np.arange(total, dtype=dtype)
    random.shuffle(result[:first])
    if first < total:
        random.shuffle(result[first:])
    return result


class MegatronBlend:
    """Megatron's blend: each position goes to the corpus that is furthest behind, in float64, the first one if several
    are equal. Steps through all positions once."""

    def __init__(self, weights: Sequence[float], samples: int) -> None:
        """samples: number of samples that the Megatron run was started for."""
        all_weights = np.array(weights, np.float64)
        self.shares: list[float] = (all_weights / np.sum(all_weights)).tolist()
        self.num_samples, self.samples_of = samples, [samples]
        if len(weights) > 1:
            needed = [math.ceil(samples * share) for share in self.shares]
            self.num_samples = sum(needed)
            self.samples_of = [math.ceil(count * (1 + _SURPLUS)) for count in needed]
        self._corpora, self._numbers = self._walk()

    def _walk(self) -> tuple[np.ndarray, np.ndarray]:
        corpora = np.zeros(self.num_samples, np.int16)
        numbers = np.arange(self.num_samples, dtype=np.int64)
        if len(self.shares) > 1:
            given, shares = [0] * len(self.shares), list(enumerate(self.shares))
            for position in range(self.num_samples):
                scale, behind, chosen = max(position, 1.0), -math.inf, 0
                for i, share in shares:
                    if (error := share * scale - given[i]) > behind:
                        behind, chosen = error, i
                corpora[position], numbers[position] = chosen, given[chosen]
                given[chosen] += 1
        return corpora, numbers

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See blend.Blend.locate. Raises DataError for a position beyond the run that the order was built for."""
        if positions.size and int(positions.max()) >= self.num_samples:
            raise DataError(
                f"megalite.data.megatron_samples: the order is built for {self.num_samples} samples but the run "
                f"needs sample {int(positions.max())}: in Megatron a longer run has another order"
            )
        return self._corpora[positions].astype(np.int64), self._numbers[positions]

    def counts(self, position: int) -> list[int]:
        """See blend.Blend.counts."""
        return np.bincount(self._corpora[:position], minlength=len(self.shares)).tolist()
