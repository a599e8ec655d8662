"""Samples of an encoder-decoder: a source, which the encoder reads, and the target, which is predicted.

The first `source_length` of a sample's S tokens are for the source and its end token, the rest for the target after its
start token; `labels` has the target's next token at each position. With pairs (pairs.py) each document is one pair,
whose marks distinguish source and target; padding of the source has a document number other than 0. With span
corruption (arXiv 1910.10683, section 3.1.4) both come from one run of text: spans of it are replaced by sentinels, and
the target contains each sentinel followed by its span. The spans are a pure function of the run's seed, the sample's
number in the run and the position, like masks (masking.py). Next: batch.py.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megalite.config import Data
from megalite.config.objectives import Pairs, SpanLengths, Spans
from megalite.data.permutation import STEP, hashed, mixed
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError

KEY = "megalite.data.objective"
SENTINEL = "<extra_id_{number}>"
_KEPT, _NOISE = range(2)  # the purposes of draws


@dataclass(frozen=True)
class SampleRows:
    """A sample's rows [S] to fill; initially tokens are 0, labels -100 and documents 0."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: np.ndarray | None

    def fill(self, source: np.ndarray, target: np.ndarray, source_length: int, start: int) -> None:
        """source: with its end token, at most source_length; target: with its end token, truncated to fit."""
        self.tokens[: len(source)] = source
        if self.documents is not None:
            self.documents[len(source) : source_length] = 1
        target = target[: len(self.tokens) - source_length]
        stop = source_length + len(target)
        self.tokens[source_length] = start
        self.tokens[source_length + 1 : stop] = target[:-1]
        self.labels[source_length:stop] = target


class SourceTarget(Protocol):
    """Builds source and target from the tokens of a sample."""

    def fill(
        self, ids: np.ndarray, marks: np.ndarray | None, number: int, rows: SampleRows
    ) -> None:
        """Fills the rows of a sample. ids int64 [n]; marks [n]: 1 if the loss counts the token; number: of the sample
        in the run."""
        ...


@dataclass(frozen=True)
class OfPairs:
    """For documents that are pairs; their last token is the end token, of the target and also of the source."""

    source_length: int
    start: int

    def fill(
        self, ids: np.ndarray, marks: np.ndarray | None, number: int, rows: SampleRows
    ) -> None:
        """See SourceTarget."""
        assert marks is not None, "the config's rules require marks"
        source = ids[marks == 0][: self.source_length - 1]
        rows.fill(np.append(source, ids[-1]), ids[marks != 0], self.source_length, self.start)


@dataclass(frozen=True)
class OfSpans:
    """For span corruption of runs of text. sentinels int64 [spans or more]; seed: of the spans."""

    lengths: SpanLengths
    start: int
    end: int
    sentinels: np.ndarray
    seed: int

    def fill(
        self, ids: np.ndarray, marks: np.ndarray | None, number: int, rows: SampleRows
    ) -> None:
        """See SourceTarget. A text begins with tokens that are kept and ends with a span."""
        lengths, source, target, place = self.lengths, [], [], 0
        kept = self._parts(_KEPT, number, lengths.text - lengths.noise)
        noise = self._parts(_NOISE, number, lengths.noise)
        for sentinel, before, span in zip(self.sentinels.tolist(), kept, noise, strict=False):
            source += [*ids[place : place + before].tolist(), sentinel]
            place += before
            target += [sentinel, *ids[place : place + span].tolist()]
            place += span
        made = np.array([*source, self.end]), np.array([*target, self.end])
        rows.fill(*made, lengths.source, self.start)

    def _parts(self, what: int, number: int, count: int) -> list[int]:
        """Divides `count` tokens into `spans` parts of at least one; all divisions are equally likely."""
        key = int(hashed(np.array([number], np.uint64), mixed(self.seed, what))[0])
        draws = hashed(np.arange(1, count).astype(np.uint64) * STEP, key)
        ends = np.sort(np.argsort(draws, kind="stable")[: self.lengths.spans - 1]) + 1
        return np.diff([0, *ends.tolist(), count]).tolist()


def source_target_of(data: Data, vocabulary_size: int, seed: int) -> SourceTarget | None:
    """The builder for a config; None if the objective has no source. seed: of spans. Raises ConfigError if a token that
    it needs is missing or outside the vocabulary."""
    objective = data.objective
    if isinstance(objective, Pairs):
        _check_ids({"start_token_id": [objective.start_token_id]}, vocabulary_size)
        return OfPairs(objective.source_length, objective.start_token_id)
    if not isinstance(objective, Spans):
        return None
    assert data.spans is not None, "the config's rules require them"
    end, sentinels, needed = objective.end_token_id, objective.sentinel_token_ids, data.spans.spans
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        end = tokenizer.eod_id if end is None else end
        if sentinels is None:
            names = [SENTINEL.format(number=number) for number in range(needed)]
            found = tokenizer.ids_of(names)
            sentinels = [number for number in found if number is not None]
    if end is None:
        rule = f"has no end-of-document token: give {KEY}.end_token_id or another tokenizer"
        raise ConfigError(f"megalite.data.tokenizer: {data.tokenizer}: {rule}")
    assert sentinels is not None, "the config's rules require them or a tokenizer"
    if len(set(sentinels)) < needed:
        rule = f"must be {needed}, one per span, such as <extra_id_0>, <extra_id_1>, …"
        raise ConfigError(f"{KEY}.sentinel_token_ids: {len(set(sentinels))} tokens: {rule}")
    ids = {"start_token_id": [objective.start_token_id], "end_token_id": [end]}
    _check_ids(ids | {"sentinel_token_ids": sentinels}, vocabulary_size)
    return OfSpans(
        data.spans, objective.start_token_id, end, np.array(sentinels[:needed], np.int64), seed
    )


def _check_ids(ids: dict[str, list[int]], vocabulary_size: int) -> None:
    for name, values in ids.items():
        if max(values) >= vocabulary_size:
            rule = f"must be below the model's vocab_size {vocabulary_size}"
            raise ConfigError(f"{KEY}.{name}: {max(values)}: {rule}")
