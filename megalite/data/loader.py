"""The data loader: a pure function from positions in the run to batches.

There is no state, no worker and no queue: a batch is a few slices of memory maps, which takes microseconds per sample
and lets any rank read any positions. `TrainData` never ends; `ValidData` contains each corpus's samples once, in order.
`batch.py` builds batches, `corpus_check.py` checks whole corpora.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from megalite.config import Data
from megalite.config.sections import Source
from megalite.data.batch import UNCOUNTED, Batch, BatchReader, CorpusStream
from megalite.data.blend import Blend
from megalite.data.corpus_check import check_corpus
from megalite.data.indexed import (
    IndexedCorpus,
    files_of,
    labels_prefix,
    marks_prefix,
    names_file,
)
from megalite.data.masking import masking_of
from megalite.data.megatron import MegatronBlend, MegatronSamples
from megalite.data.packing import WholeDocuments
from megalite.data.permutation import mixed
from megalite.data.position import Position
from megalite.data.samples import Shuffled, Windows, part_of
from megalite.data.source_target import OfSpans, source_target_of
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.inputs import read_json_object, reading

__all__ = ["UNCOUNTED", "Batch", "Share", "TrainData", "ValidData", "check_data", "marks_prefix"]


_TRAINING, _EVALUATION = range(2)  # the purpose that masks are drawn for
_EDGES = 200  # most windows of a corpus that are checked for words that they cut
_PAIRS = 200  # most pairs of a corpus that are checked for truncation


class Share(NamedTuple):
    """The samples taken from one corpus of a blend: its prefix, its share in the config, and samples so far."""

    path: str
    asked: float
    samples: int


class _Opened(NamedTuple):
    source: Source
    corpus: IndexedCorpus
    marks: IndexedCorpus | None


class TrainData:
    """Training samples by position in the run: the blend chooses the corpus, then that corpus's own order applies.
    data: of a resolved config."""

    def __init__(self, data: Data, seed: int, vocabulary_size: int, check: bool = True) -> None:
        """Opens the corpora and, with `check`, checks their whole indices: one process per node can do that for the
        others. Raises DataError or ConfigError with one line."""
        opened = [_open(source, data, check) for source in data.train]
        self.paths = [source.path for source in data.train]
        self._reader = _reader(data, vocabulary_size, mixed(seed, _TRAINING), last=False)
        self._position = Position()
        self.notes: list[str] = []  # lines for the log about truncated documents and cut words
        weights = [source.weight for source in data.train]
        if data.order == "megatron":
            assert data.megatron_samples is not None, "Config.resolve fills it in"
            self._blend = MegatronBlend(weights, data.megatron_samples)
            self._streams = [
                CorpusStream(_megatron_samples(of, data, samples, seed), of.marks)
                for of, samples in zip(opened, self._blend.samples_of, strict=True)
            ]
        else:
            self._blend = Blend(weights)
            in_order = [_in_order(of, data, self.notes) for of in opened]
            self._streams = [
                CorpusStream(Shuffled(samples, seed, number), marks)
                for number, (samples, marks) in enumerate(in_order)
            ]
            self.notes += self._cut_words([samples for samples, _ in in_order])

    def _cut_words(self, in_order: Sequence[Windows | WholeDocuments]) -> list[str]:
        """A log line about each corpus whose windows begin within words, with whole-word masking."""
        words = None if self._reader.masking is None else self._reader.masking.words
        lines = []
        for path, samples in zip(self.paths, in_order, strict=True):
            if words is None or not isinstance(samples, Windows) or samples.num_samples == 1:
                continue
            share = words.cut(*samples.edges(_EDGES)).mean()
            note = "of the windows begin within a word, whose two parts are masked separately"
            lines.append(f"data: {path}: about {share:.0%} {note}")
        return lines

    def at(self, position: Position, steps: int) -> "TrainData":
        """The same samples for the step at `position` in a run of `steps`: without those that the position leaves out,
        and with the step's share of masks, which may follow a schedule."""
        changed = copy.copy(self)
        changed._position = position
        if (masking := self._reader.masking) is not None:
            masking = masking.at_step(position.step, steps)
            changed._reader = replace(self._reader, masking=masking)
        return changed

    def batch(self, positions: Sequence[int] | range) -> Batch:
        """The samples with these numbers in the run, from 0; the same numbers always give the same samples.

        Raises DataError for a token id outside the vocabulary.
        """
        places = [self._position.place(number) for number in positions]
        numbers = np.asarray(places, np.int64)
        return self._reader.read(self._streams, *self._blend.locate(numbers), numbers)

    def shares(self, consumed_samples: int) -> list[Share]:
        """The samples taken from each corpus in the first `consumed_samples` samples of the run."""
        counts = self._blend.counts(consumed_samples)
        return [Share(*row) for row in zip(self.paths, self._blend.shares, counts, strict=True)]

    def share_lines(self, consumed_samples: int) -> list[str]:
        """A log line about each corpus of a blend, with the samples taken from it."""
        if len(self.paths) == 1 or consumed_samples == 0:
            return []
        return [
            f"data: {share.path}: {share.samples:,} of {consumed_samples:,} samples, "
            f"{share.samples / consumed_samples:.4%}; requested {share.asked:.4%}"
            for share in self.shares(consumed_samples)
        ]


class ValidData:
    """The samples of the validation corpora in order, one corpus after another, each once.

    corpora: for each its prefix and the range of positions of its samples.
    """

    def __init__(self, data: Data, vocabulary_size: int, check: bool = True) -> None:
        """Opens the corpora as TrainData does. Raises DataError or ConfigError with one line."""
        in_order = [_in_order(_open(source, data, check), data, []) for source in data.valid]
        self._streams = [CorpusStream(samples, marks) for samples, marks in in_order]
        self._ends = np.cumsum([0] + [samples.num_samples for samples, _ in in_order])
        # The same masks in every run, and at every step.
        self._reader = _reader(data, vocabulary_size, mixed(0, _EVALUATION), last=True)
        self.corpora = [
            (source.path, range(int(start), int(stop)))
            for source, start, stop in zip(data.valid, self._ends[:-1], self._ends[1:], strict=True)
        ]

    @property
    def num_samples(self) -> int:
        """Number of samples of all corpora."""
        return int(self._ends[-1])

    def batch(self, positions: Sequence[int] | range) -> Batch:
        """The samples at these positions in [0, num_samples). Raises DataError as in TrainData.batch."""
        places = np.asarray(positions, np.int64)
        corpora = np.searchsorted(self._ends, places, "right") - 1
        return self._reader.read(self._streams, corpora, places - self._ends[corpora], places)


def epoch_samples(data: Data, check: bool) -> int:
    """Number of samples in one epoch of the only corpus of `data`. check: whether to check its whole index. Raises
    DataError."""
    (source,) = data.train
    return _in_order(_open(source, data, check), data, [])[0].num_samples


def check_data(data: Data, vocabulary_size: int) -> None:
    """Checks every corpus of a config completely: structure, checksums, every token id; the result is cached
    (`corpus_check.py`). Raises DataError or ConfigError with one line."""
    TrainData(data, 0, vocabulary_size)
    if data.valid:
        ValidData(data, vocabulary_size)
    for prefix in dict.fromkeys(source.path for source in [*data.train, *data.valid]):
        check_corpus(prefix, vocabulary_size)
        if data.loss == "marked":
            check_corpus(marks_prefix(prefix), 2)
        if data.classes:
            check_corpus(labels_prefix(prefix), len(data.classes))


def tokenizer_ids(data: Data, vocabulary_size: int) -> dict[str, Any]:
    """The token ids that samples depend on, from the tokenizer or the config, by name; empty if there are none.

    Raises ConfigError or DataError if one is missing.
    """
    ids: dict[str, Any] = {}
    if (masking := masking_of(data, vocabulary_size, seed=0, last=False)) is not None:
        ids |= masking.ids
    made = source_target_of(data, vocabulary_size, seed=0)
    if isinstance(made, OfSpans):
        ids |= {"end of document": made.end, "sentinels": made.sentinels.tolist()}
    if data.eod_mask_loss:
        ids["end of document"] = _end_of_document(data)
    return ids


def epochs_of(data: Data, seed: int, vocabulary_size: int, samples: int) -> list[tuple[str, float]]:
    """(prefix, number of epochs) of each training corpus in a run of `samples` samples."""
    given = TrainData(data, seed, vocabulary_size, check=False).shares(samples)
    opened = [_open(source, data, False) for source in data.train]
    sizes = [_in_order(of, data, [])[0].num_samples for of in opened]
    return [(share.path, share.samples / size) for share, size in zip(given, sizes, strict=True)]


def _open(source: Source, data: Data, check: bool) -> _Opened:
    with reading(source.path, DataError):
        return _opened(source, data, check)


def _opened(source: Source, data: Data, check: bool) -> _Opened:
    corpus = IndexedCorpus(source.path)
    beside = files_of(marks_prefix(source.path))[0]
    if data.loss is None and beside.exists():
        rule = 'set "marked" to count only the tokens that it marks, or "all"'
        raise ConfigError(f"megalite.data.loss: missing: {beside} exists: {rule}")
    marks = IndexedCorpus(marks_prefix(source.path)) if data.loss == "marked" else None
    if data.classes:
        _check_names(source.path, data.classes)
        marks = IndexedCorpus(labels_prefix(source.path))
    for opened in (corpus, marks) if check else ():
        if opened is not None:
            opened.check_index()
    if marks is not None:
        check_marks(marks, corpus)
    return _Opened(source, corpus, marks)


def check_marks(marks: IndexedCorpus, corpus: IndexedCorpus) -> None:
    """Raises DataError unless `marks` has one byte for each token of `corpus`."""
    if (marks.num_tokens, marks.dtype) != (corpus.num_tokens, np.dtype(np.uint8)):
        raise DataError(
            f"{marks.tokens_path}: has {marks.num_tokens} entries of {marks.dtype}: must have a byte for each of the "
            f"{corpus.num_tokens} tokens of {corpus.tokens_path}"
        )


def _check_names(prefix: str, classes: tuple[str, ...]) -> None:
    """Raises DataError if a corpus has no labels, ConfigError if their names differ."""
    path = names_file(prefix)
    if not path.is_file():
        rule = "needs texts with labels, which tools/preprocess_data.py --label-key writes"
        raise DataError(f"{path}: missing: megalite.data.objective.classes {rule}")
    names = read_json_object(path, DataError).get("classes")
    if names != list(classes):
        raise ConfigError(
            f"megalite.data.objective.classes: {json.dumps(classes)}: must be {json.dumps(names)}, as in {path}"
        )


def _in_order(
    of: _Opened, data: Data, notes: list[str]
) -> tuple[Windows | WholeDocuments, IndexedCorpus | None]:
    """The samples of a corpus in its own order. Appends a line to `notes` if some are truncated."""
    if data.samples == "windows":
        length = data.sequence_length if data.spans is None else data.spans.text
        return Windows(of.corpus, length, of.source.split, data.ahead), of.marks
    documents = part_of(of.corpus.num_documents, of.source.split)
    with reading(of.source.path, DataError):
        whole = WholeDocuments(
            of.corpus,
            documents,
            data.sequence_length,
            data.samples == "packed",
            data.ahead,
            cuts=not data.source_length,
        )
    if data.source_length and of.marks is not None:
        notes += _pairs_cut(of, documents, data.source_length, data.sequence_length)
    elif whole.cut:
        notes.append(
            f"data: {of.source.path}: {whole.cut:,} of {len(documents):,} documents are truncated to "
            f"megalite.data.sequence_length {data.sequence_length}{' + 1' if data.ahead else ''} tokens"
        )
    return whole, of.marks


def _pairs_cut(of: _Opened, documents: range, source_length: int, length: int) -> list[str]:
    """A line if the sources or targets of some pairs are truncated."""
    assert of.marks is not None
    checked = documents[:: -(-len(documents) // _PAIRS)]
    sources = targets = 0
    for document in checked:
        start, stop = of.corpus.document_start(document), of.corpus.document_start(document + 1)
        target = int(np.count_nonzero(of.marks.read(start, stop)))
        sources += stop - start - target > source_length - 1  # one place is for the end token
        targets += target > length - source_length
    if not sources and not targets:
        return []
    limit = f"megalite.data.objective.source_length {source_length} of {length}"
    return [
        f"data: {of.source.path}: of {len(checked)} pairs, {sources} sources and {targets} targets are truncated by "
        f"{limit}"
    ]


def _megatron_samples(of: _Opened, data: Data, samples: int, seed: int) -> MegatronSamples:
    sequences = part_of(of.corpus.num_sequences, of.source.split)
    return MegatronSamples(of.corpus, sequences, data.sequence_length, samples, seed)


def _reader(data: Data, vocabulary_size: int, seed: int, last: bool) -> BatchReader:
    """The reader of a config's batches. seed: for masks or spans; last: as in masking_of."""
    eod_id = _end_of_document(data) if data.eod_mask_loss else None
    whole = data.samples != "windows"
    masking = masking_of(data, vocabulary_size, seed, last)
    return BatchReader(
        data.sequence_length,
        vocabulary_size,
        data.reset_attention,
        whole,
        eod_id,
        masking,
        data.ahead,
        bool(data.classes),
        source_target_of(data, vocabulary_size, seed),
        data.objective == "prefix",
    )


def _end_of_document(data: Data) -> int:
    assert data.tokenizer is not None, "config/rules.py requires it"
    eod_id = load_tokenizer(data.tokenizer).eod_id
    if eod_id is None:
        raise DataError(
            f"{data.tokenizer}: has no end-of-sequence token, which megalite.data.eod_mask_loss needs"
        )
    return eod_id
