"""What the training loop asks: a pure function from positions in the run to batches.

There is no state, no worker and no queue: a batch is a few slices of memory maps, which costs microseconds a
sample and lets any rank ask for any positions. `TrainData` never ends, `ValidData` holds each
corpus's samples once, in order. `batch.py` has the form of a batch, `corpus_check.py` reads whole corpora.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from megalite.config import Data
from megalite.config.sections import Source
from megalite.data.batch import UNCOUNTED, Batch, BatchReader, Stream
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
from megalite.data.samples import Shuffled, Windows, part_of
from megalite.data.source_target import OfSpans, source_target_of
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.inputs import read_json_object, reading

__all__ = ["UNCOUNTED", "Batch", "Share", "TrainData", "ValidData", "check_data", "marks_prefix"]


_TRAINING, _EVALUATION = range(2)  # what masks are drawn for
_EDGES = 200  # windows of a corpus at most, that are looked at for words that they cut
_PAIRS = 200  # pairs of a corpus at most, that are looked at for what is cut of them


class Share(NamedTuple):
    """What a corpus of a blend has given: its prefix, the share in the config, and samples so far."""

    path: str
    asked: float
    samples: int


class _Opened(NamedTuple):
    source: Source
    corpus: IndexedCorpus
    marks: IndexedCorpus | None


class TrainData:
    """Position in the run -> sample: the blend's corpus, then that corpus's own order. `data` is of a resolved
    config."""

    def __init__(self, data: Data, seed: int, vocabulary_size: int, check: bool = True) -> None:
        """Open the corpora and, with `check`, read their indices through: one process of a node may do that
        for the others. Raises DataError or ConfigError with one line."""
        opened = [_open(source, data, check) for source in data.train]
        self.paths = [source.path for source in data.train]
        self._reader = _reader(data, vocabulary_size, mixed(seed, _TRAINING), last=False)
        self.notes: list[str] = []  # lines for the log: documents that had to be cut
        weights = [source.weight for source in data.train]
        if data.order == "megatron":
            assert data.megatron_samples is not None, "Config.resolve fills it in"
            self._blend = MegatronBlend(weights, data.megatron_samples)
            self._streams = [
                Stream(_megatron_samples(of, data, samples, seed), of.marks)
                for of, samples in zip(opened, self._blend.samples_of, strict=True)
            ]
        else:
            self._blend = Blend(weights)
            in_order = [_in_order(of, data, self.notes) for of in opened]
            self._streams = [
                Stream(Shuffled(samples, seed, number), marks)
                for number, (samples, marks) in enumerate(in_order)
            ]
            self.notes += self._cut_words([samples for samples, _ in in_order])

    def _cut_words(self, in_order: Sequence[Windows | WholeDocuments]) -> list[str]:
        """A line for the log about each corpus whose windows begin within words that are masked whole."""
        words = None if self._reader.masking is None else self._reader.masking.words
        lines = []
        for path, samples in zip(self.paths, in_order, strict=True):
            if words is None or not isinstance(samples, Windows) or samples.num_samples == 1:
                continue
            share = words.cut(*samples.edges(_EDGES)).mean()
            told = "of the windows begin within a word, whose two parts are masked separately"
            lines.append(f"data: {path}: about {share:.0%} {told}")
        return lines

    def at_step(self, step: int, steps: int) -> "TrainData":
        """The same samples as a step of a run of `steps` has them, counted from 0: masks may follow a schedule."""
        masking = self._reader.masking
        if masking is None:
            return self
        changed = copy.copy(self)
        changed._reader = replace(self._reader, masking=masking.at_step(step, steps))
        return changed

    def batch(self, positions: Sequence[int] | range) -> Batch:
        """The samples at these positions of the run, from 0 on; the same for the same positions, always.

        Raises DataError for a token id that the vocabulary does not have.
        """
        numbers = np.asarray(positions, np.int64)
        return self._reader.read(self._streams, *self._blend.locate(numbers), numbers)

    def shares(self, consumed_samples: int) -> list[Share]:
        """What each corpus has given after so many samples of the run."""
        counts = self._blend.counts(consumed_samples)
        return [Share(*row) for row in zip(self.paths, self._blend.shares, counts, strict=True)]

    def share_lines(self, consumed_samples: int) -> list[str]:
        """A line for the log about each corpus of a blend: what it has given."""
        if len(self.paths) == 1 or consumed_samples == 0:
            return []
        return [
            f"data: {share.path}: {share.samples:,} of {consumed_samples:,} samples, "
            f"{share.samples / consumed_samples:.4%}; asked {share.asked:.4%}"
            for share in self.shares(consumed_samples)
        ]


class ValidData:
    """The samples of the validation corpora in order, one corpus after another, each once.

    `corpora`: of each its prefix and the range of positions that its samples have.
    """

    def __init__(self, data: Data, vocabulary_size: int, check: bool = True) -> None:
        """Open the corpora as TrainData does. Raises DataError or ConfigError with one line."""
        in_order = [_in_order(_open(source, data, check), data, []) for source in data.valid]
        self._streams = [Stream(samples, marks) for samples, marks in in_order]
        self._ends = np.cumsum([0] + [samples.num_samples for samples, _ in in_order])
        # The same masks in every run, and at every step.
        self._reader = _reader(data, vocabulary_size, mixed(0, _EVALUATION), last=True)
        self.corpora = [
            (source.path, range(int(start), int(stop)))
            for source, start, stop in zip(data.valid, self._ends[:-1], self._ends[1:], strict=True)
        ]

    @property
    def num_samples(self) -> int:
        """Samples of all corpora."""
        return int(self._ends[-1])

    def batch(self, positions: Sequence[int] | range) -> Batch:
        """The samples at these positions in [0, num_samples). Raises DataError as TrainData.batch does."""
        places = np.asarray(positions, np.int64)
        corpora = np.searchsorted(self._ends, places, "right") - 1
        return self._reader.read(self._streams, corpora, places - self._ends[corpora], places)


def epoch_samples(data: Data, check: bool) -> int:
    """Samples of one epoch of the only corpus of `data`. check: read its index through. Raises DataError."""
    (source,) = data.train
    return _in_order(_open(source, data, check), data, [])[0].num_samples


def check_data(data: Data, vocabulary_size: int) -> None:
    """Read every corpus of a config whole, once: structure, checksums, every token id; what was found is
    remembered (`corpus_check.py`). Raises DataError or ConfigError with one line."""
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
    """The token ids that samples depend on and that a tokenizer decides, by their names; empty where there are none.

    An id that the config gives itself is among them. Raises ConfigError or DataError where one is missing.
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
    """(prefix, how often a run of so many samples goes through it) of each training corpus."""
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
        rule = 'say "marked" to count what it marks, or "all"'
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
    """DataError unless `marks` has a byte for each token of `corpus`."""
    if (marks.num_tokens, marks.dtype) != (corpus.num_tokens, np.dtype(np.uint8)):
        raise DataError(
            f"{marks.tokens_path}: holds {marks.num_tokens} tokens of {marks.dtype}: must mark each of the "
            f"{corpus.num_tokens} of {corpus.tokens_path} with a byte"
        )


def _check_names(prefix: str, classes: tuple[str, ...]) -> None:
    """DataError where a corpus's labels have other names, or it has none."""
    path = names_file(prefix)
    if not path.is_file():
        rule = "needs texts with labels, as tools/preprocess_data.py --label-key makes them"
        raise DataError(f"{path}: missing: megalite.data.objective.classes {rule}")
    names = read_json_object(path, DataError).get("classes")
    if names != list(classes):
        raise ConfigError(
            f"megalite.data.objective.classes: {json.dumps(classes)}: must be {json.dumps(names)}, as in {path}"
        )


def _in_order(
    of: _Opened, data: Data, notes: list[str]
) -> tuple[Windows | WholeDocuments, IndexedCorpus | None]:
    """The samples of a corpus in its own order; `notes` gets a line where some are cut."""
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
            f"data: {of.source.path}: {whole.cut:,} of {len(documents):,} documents are cut to "
            f"megalite.data.sequence_length {data.sequence_length}{' + 1' if data.ahead else ''} tokens"
        )
    return whole, of.marks


def _pairs_cut(of: _Opened, documents: range, source_length: int, length: int) -> list[str]:
    """A line where pairs lose the end of their source or target."""
    assert of.marks is not None
    looked = documents[:: -(-len(documents) // _PAIRS)]
    sources = targets = 0
    for document in looked:
        start, stop = of.corpus.document_start(document), of.corpus.document_start(document + 1)
        target = int(np.count_nonzero(of.marks.read(start, stop)))
        sources += stop - start - target > source_length - 1  # its end token needs a place
        targets += target > length - source_length
    if not sources and not targets:
        return []
    where = f"megalite.data.objective.source_length {source_length} of {length}"
    return [
        f"data: {of.source.path}: of {len(looked)} pairs {sources} lose the end of their source and {targets} that of "
        f"their target to {where}"
    ]


def _megatron_samples(of: _Opened, data: Data, samples: int, seed: int) -> MegatronSamples:
    sequences = part_of(of.corpus.num_sequences, of.source.split)
    return MegatronSamples(of.corpus, sequences, data.sequence_length, samples, seed)


def _reader(data: Data, vocabulary_size: int, seed: int, last: bool) -> BatchReader:
    """seed: of masks, where there are some; last: as of masking_of."""
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
    assert data.tokenizer is not None, "config/rules.py asks for it"
    eod_id = load_tokenizer(data.tokenizer).eod_id
    if eod_id is None:
        raise DataError(
            f"{data.tokenizer}: has no end-of-sequence token, which megalite.data.eod_mask_loss needs"
        )
    return eod_id
