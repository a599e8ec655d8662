"""Samples to batches: tokens, labels, what does not count in the loss, and the check of each id.

B samples, S sequence length in tokens. A label is the token that follows, or with masks (masking.py) the token itself;
of texts to classify the number of a text's label, at its first token. -100 does not count: after the end of a document
where documents are kept apart, where `prefix.mask` marks no answer, in filling, where nothing is masked, and after the
first token of a text to classify.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalite.data.corpus_check import unknown_id
from megalite.data.indexed import IndexedCorpus
from megalite.data.masking import UNCOUNTED, Masking
from megalite.data.samples import Piece, Samples, read_documents, read_tokens
from megalite.data.source_target import Rows, SourceTarget


class Batch(NamedTuple):
    """`tokens`, `labels` int64 [B, S]; `documents` int32 [B, S], the number within its sample of each token's
    document, or None where documents run together. Filling at a sample's end is a document of its own. `prefixes` bool
    [B, S], with the objective "prefix": whether a token is one of its document's prompt."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: np.ndarray | None
    prefixes: np.ndarray | None = None


class Stream(NamedTuple):
    """Samples of a corpus, and the corpus of marks (1: counts) or of labels beside it where there is one."""

    samples: Samples
    marks: IndexedCorpus | None


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of one form."""

    length: int
    vocabulary_size: int
    apart: bool
    """Documents are kept apart."""
    whole: bool
    """Each piece of a sample is a document (packing.py), not a part of one run of tokens."""
    eod_id: int | None
    """What is predicted from this token does not count."""
    masking: Masking | None = None
    ahead: int = 1
    """How far after a position its label is."""
    classifies: bool = False
    """Labels are those of texts, which the corpus beside the tokens holds."""
    source_target: SourceTarget | None = None
    """How a sample's source and target are made."""
    prefixed: bool = False
    """What is before a document's first marked token is a prompt."""

    def read(
        self,
        streams: Sequence[Stream],
        corpora: np.ndarray,
        places: np.ndarray,
        numbers: np.ndarray,
    ) -> Batch:
        """The samples at `places` [B] of the orders of the streams `corpora` [B]; numbers [B]: theirs in the run, which
        masks are drawn from. Raises DataError for a token id that the vocabulary does not have, and for a corpus that
        has changed since it was opened."""
        shape = (len(corpora), self.length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, UNCOUNTED, np.int64)
        documents = np.zeros(shape, np.int32) if self.apart else None
        prefixes = np.zeros(shape, bool) if self.prefixed else None
        fill = self._fill_whole if self.whole else self._fill_window
        # By corpus: the samples of one are looked up together.
        for number in np.unique(corpora).tolist():
            stream, rows = streams[number], np.flatnonzero(corpora == number)
            for corpus in (stream.samples.corpus, stream.marks):
                if corpus is not None:
                    corpus.check_unchanged()
            for row, pieces in zip(rows.tolist(), stream.samples.pieces(places[rows]), strict=True):
                if self.source_target is not None:
                    kept_apart = None if documents is None else documents[row]
                    filled = Rows(tokens[row], labels[row], kept_apart)
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
        stream: Stream,
        pieces: list[Piece],
        tokens: np.ndarray,
        labels: np.ndarray,
        documents: np.ndarray | None,
    ) -> None:
        """Rows [S] of one sample: its tokens in a run, and the one after them where that is predicted."""
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
        stream: Stream,
        pieces: list[Piece],
        tokens: np.ndarray,
        labels: np.ndarray,
        documents: np.ndarray | None,
    ) -> None:
        """Rows [S] of one sample: each document's tokens but the last, after which nothing is predicted, then
        filling."""
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
        stream: Stream,
        pieces: list[Piece],
        number: int,
        rows: Rows,
    ) -> None:
        """Rows of one sample of an encoder-decoder; number: the sample's in the run."""
        ids = np.empty(sum(stop - start for start, stop in pieces), np.int64)
        marks = None if stream.marks is None else np.empty_like(ids)
        read_tokens(stream.samples.corpus, pieces, ids)
        self._check(stream, pieces, ids)
        if stream.marks is not None and marks is not None:
            read_tokens(stream.marks, pieces, marks)
        made.fill(ids, marks, number, rows)

    def _fill_prefixes(self, stream: Stream, pieces: list[Piece], prefixes: np.ndarray) -> None:
        """Row [S] of one sample: in each document the tokens before its first marked one."""
        assert stream.marks is not None, "config/rules.py asks for them"
        filled = 0
        for start, stop in pieces:
            marks = stream.marks.read(start, stop - self.ahead)
            prefixes[filled : filled + len(marks)] = np.cumsum(marks) == 0
            filled += len(marks)

    def _check(self, stream: Stream, pieces: list[Piece], ids: np.ndarray) -> None:
        unsigned = ids.view(np.uint64)  # a negative id is a huge one there
        if unsigned.max() < self.vocabulary_size:
            return
        left = int(np.argmax(unsigned >= self.vocabulary_size))
        for start, stop in pieces:
            if left < stop - start:
                raise unknown_id(stream.samples.corpus, start + left, self.vocabulary_size)
            left -= stop - start
