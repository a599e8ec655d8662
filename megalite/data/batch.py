"""Turns samples into batches: tokens, labels with -100 where no loss counts, and a check of each id.

B samples, S sequence length in tokens. A label is the next token, or with masks (masking.py) the token itself; for
classification it is the number of a text's label, at the text's first token. Labels are -100 at the end of a document
if documents are kept apart, where `prefix.mask` marks no answer, in padding, at tokens that are not masked, and after
the first token of a text to classify.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalite.data.corpus_check import unknown_id
from megalite.data.indexed import IndexedCorpus
from megalite.data.masking import UNCOUNTED, Masking
from megalite.data.samples import Piece, Samples, read_documents, read_tokens
from megalite.data.source_target import SampleRows, SourceTarget


class Batch(NamedTuple):
    """`tokens`, `labels` int64 [B, S]; `documents` int32 [B, S], the number of each token's document within its sample,
    or None if documents run together. Padding at the end of a sample is a separate document. `prefixes` bool [B, S],
    with the objective "prefix": whether a token belongs to its document's prompt."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: np.ndarray | None
    prefixes: np.ndarray | None = None


class CorpusStream(NamedTuple):
    """Samples of a corpus, and its corpus of marks (1: counts) or labels, if there is one."""

    samples: Samples
    marks: IndexedCorpus | None


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of one form."""

    length: int
    vocabulary_size: int
    apart: bool
    """Whether documents are kept apart."""
    whole: bool
    """Whether each piece of a sample is a whole document (packing.py), not a part of one run of tokens."""
    eod_id: int | None
    """Predictions from this token do not count."""
    masking: Masking | None = None
    ahead: int = 1
    """Distance from a position to its label."""
    classifies: bool = False
    """Whether labels are those of texts, from the corpus of labels."""
    source_target: SourceTarget | None = None
    """Builds a sample's source and target."""
    prefixed: bool = False
    """Whether the tokens before a document's first marked token are a prompt."""

    def read(
        self,
        streams: Sequence[CorpusStream],
        corpora: np.ndarray,
        places: np.ndarray,
        numbers: np.ndarray,
    ) -> Batch:
        """Reads the samples at positions `places` [B] in the orders of the streams `corpora` [B]. numbers [B]: numbers
        of the samples in the run, from which masks are drawn. Raises DataError for a token id outside the vocabulary,
        and for a corpus that has changed since it was opened."""
        shape = (len(corpora), self.length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, UNCOUNTED, np.int64)
        documents = np.zeros(shape, np.int32) if self.apart else None
        prefixes = np.zeros(shape, bool) if self.prefixed else None
        fill = self._fill_whole if self.whole else self._fill_window
        # Group by corpus, so that the samples of each are looked up together.
        for number in np.unique(corpora).tolist():
            stream, rows = streams[number], np.flatnonzero(corpora == number)
            for corpus in (stream.samples.corpus, stream.marks):
                if corpus is not None:
                    corpus.check_unchanged()
            for row, pieces in zip(rows.tolist(), stream.samples.pieces(places[rows]), strict=True):
                if self.source_target is not None:
                    kept_apart = None if documents is None else documents[row]
                    filled = SampleRows(tokens[row], labels[row], kept_apart)
                    self._fill_both(self.source_target, stream, pieces, int(numbers[row]), filled)
                    continue
                fill(
                    stream,
                    pieces,
                    tokens[row],
                    labels[row],
                    None if documents is None else documents[row],
                )
                if prefixes is not None:
                    self._fill_prefixes(stream, pieces, prefixes[row])
        if self.eod_id is not None:
            labels[tokens == self.eod_id] = UNCOUNTED
        if self.masking is not None:
            self.masking.apply(tokens, labels, numbers, documents)
        return Batch(tokens, labels, documents, prefixes)

    def _fill_window(
        self,
        stream: CorpusStream,
        pieces: list[Piece],
        tokens: np.ndarray,
        labels: np.ndarray,
        documents: np.ndarray | None,
    ) -> None:
        """Fills rows [S] of one sample with a run of tokens, and the token after it if that is predicted."""
        ahead = self.ahead
        window = np.empty(self.length + ahead, np.int64)
        read_tokens(stream.samples.corpus, pieces, window)
        self._check(stream, pieces, window)
        tokens[:], labels[:] = window[: self.length], window[ahead:]
        if stream.marks is not None:
            read_tokens(stream.marks, pieces, window)
            labels[window[ahead:] == 0] = UNCOUNTED
        if documents is not None:
            numbers = np.empty(self.length + ahead, np.int32)
            read_documents(stream.samples.corpus, pieces, numbers)
            documents[:] = numbers[: self.length]
            # A document's last token must not predict the next document's first.
            labels[numbers[ahead:] != numbers[: self.length]] = UNCOUNTED

    def _fill_whole(
        self,
        stream: CorpusStream,
        pieces: list[Piece],
        tokens: np.ndarray,
        labels: np.ndarray,
        documents: np.ndarray | None,
    ) -> None:
        """Fills rows [S] of one sample with each document's tokens except the last, after which nothing is predicted,
        and then padding."""
        filled, ahead = 0, self.ahead
        for number, piece in enumerate(pieces):
            start, stop = piece
            ids = stream.samples.corpus.read(start, stop).astype(np.int64)
            self._check(stream, [piece], ids)
            end = filled + len(ids) - ahead
            tokens[filled:end], labels[filled:end] = ids[: len(ids) - ahead], ids[ahead:]
            if self.classifies and stream.marks is not None:
                labels[filled:end] = UNCOUNTED
                labels[filled] = stream.marks.read(start, start + 1)[0]
            elif stream.marks is not None:
                labels[filled:end][stream.marks.read(start + ahead, stop) == 0] = UNCOUNTED
            if documents is not None:
                documents[filled:end] = number
            filled = end
        if documents is not None:
            documents[filled:] = len(pieces)

    def _fill_both(
        self,
        made: SourceTarget,
        stream: CorpusStream,
        pieces: list[Piece],
        number: int,
        rows: SampleRows,
    ) -> None:
        """Fills the rows of one sample of an encoder-decoder. number: the sample's number in the run."""
        ids = np.empty(sum(stop - start for start, stop in pieces), np.int64)
        marks = None if stream.marks is None else np.empty_like(ids)
        read_tokens(stream.samples.corpus, pieces, ids)
        self._check(stream, pieces, ids)
        if stream.marks is not None and marks is not None:
            read_tokens(stream.marks, pieces, marks)
        made.fill(ids, marks, number, rows)

    def _fill_prefixes(
        self, stream: CorpusStream, pieces: list[Piece], prefixes: np.ndarray
    ) -> None:
        """Marks, in the row [S] of one sample, each document's tokens before its first marked one."""
        assert stream.marks is not None, "config/rules.py requires them"
        filled = 0
        for start, stop in pieces:
            marks = stream.marks.read(start, stop - self.ahead)
            prefixes[filled : filled + len(marks)] = np.cumsum(marks) == 0
            filled += len(marks)

    def _check(self, stream: CorpusStream, pieces: list[Piece], ids: np.ndarray) -> None:
        unsigned = ids.view(np.uint64)  # negative ids become huge
        if unsigned.max() < self.vocabulary_size:
            return
        index = int(np.argmax(unsigned >= self.vocabulary_size))
        for start, stop in pieces:
            if index < stop - start:
                raise unknown_id(stream.samples.corpus, start + index, self.vocabulary_size)
            index -= stop - start
