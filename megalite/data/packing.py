"""Samples of whole documents, for fine-tuning: as many documents per sample as fit, or one document and padding.

A document of n tokens takes n - 1 positions, since nothing is predicted after its last token; one longer than S + 1
tokens is truncated, and one of a single token is left out. With masked tokens it takes n positions, and one longer than
S is truncated. Documents are assigned to samples once, the longest first, each to the fullest sample with enough room
("best fit decreasing"); if documents are kept apart in attention, the assignment does not affect their results.
"""

import numpy as np

from megalite.data.indexed import IndexedCorpus
from megalite.data.samples import Piece
from megalite.errors import DataError


class WholeDocuments:
    """The samples of a corpus, each of whole documents. cut: number of documents that are longer than a sample."""

    def __init__(
        self,
        corpus: IndexedCorpus,
        documents: range,
        sequence_length: int,
        together: bool,
        ahead: int,
        cuts: bool,
    ) -> None:
        """documents: of the corpus, to use; together: several per sample, else one; ahead: tokens after the last
        position; cuts: whether longer documents are truncated here. Raises DataError if no document is long enough."""
        self.corpus, self.longest, self.cuts = corpus, sequence_length + ahead, cuts
        lengths = corpus.document_lengths(documents.start, documents.stop)
        usable = np.flatnonzero(lengths > ahead)
        if not usable.size:
            least = "two tokens" if ahead else "a token"
            raise DataError(
                f"{corpus.index_path}: no document of at least {least} in the part that is used"
            )
        self.cut = int((lengths > self.longest).sum())
        needed = np.minimum(lengths[usable] - ahead, sequence_length)
        usable += documents.start
        if together:
            sample_of = best_fit(needed, sequence_length)
            # Within a sample, documents keep the order of the corpus.
            order = np.argsort(sample_of, kind="stable")
            self._documents, counts = usable[order], np.bincount(sample_of)
        else:
            self._documents, counts = usable, np.ones(len(usable), np.int64)
        # Index in _documents of each sample's first.
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def num_samples(self) -> int:
        """Number of samples in one epoch."""
        return len(self._starts) - 1

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """The documents of each sample; see samples.Samples."""
        found = []
        bounds = zip(self._starts[positions], self._starts[positions + 1], strict=True)
        for start, stop in bounds:
            documents = self._documents[start:stop].tolist()
            found.append([self._piece(document) for document in documents])
        return found

    def _piece(self, document: int) -> Piece:
        start, stop = self.corpus.document_start(document), self.corpus.document_start(document + 1)
        return start, min(stop, start + self.longest) if self.cuts else stop


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The sample that each of `sizes` (1 to `room`) is put into, int64; samples are numbered as they are opened."""
    result = np.empty(len(sizes), np.int64)
    open_with: list[list[int]] = [[] for _ in range(room + 1)]  # samples by their remaining room
    left = 0  # bit r is set if there is a sample with room r
    opened = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = left >> size
        if fitting:
            old = size + (fitting & -fitting).bit_length() - 1  # the smallest sufficient room
            sample = open_with[old].pop()
            if not open_with[old]:
                left &= ~(1 << old)
        else:
            old, sample, opened = room, opened, opened + 1
        open_with[old - size].append(sample)
        left |= 1 << (old - size)
        result[index] = sample
    return result
