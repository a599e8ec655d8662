"""Tasks of preprocessing.py's workers: how a chunk of documents is tokenized, one task for each form of a line. Next:
workers.py.
"""

import hashlib
import json
import pickle
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from megalite.data.chat_encoder import ChatEncoder
from megalite.data.chat_forms import NotChat, sample_of
from megalite.data.documents import Bad, TextChunk, parse, parse_objects, text_of
from megalite.data.pairs import PairEncoder, pair_of
from megalite.data.partial import Encoded
from megalite.data.tokenizer import Encoder


class Task(ABC):
    """Tokenizes chunks in a worker; can be pickled."""

    dtype: np.dtype[Any]
    """Dtype of the tokens."""

    @abstractmethod
    def encode(self, chunk: TextChunk) -> Encoded:
        """Tokenizes a chunk. Documents without tokens are left out and counted."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Fingerprint of everything that the tokens of a text depend on."""


@dataclass(frozen=True)
class TextTask(Task):
    """Documents of text."""

    encoder: Encoder
    dtype: np.dtype[Any]
    text_key: str
    begin: list[int]  # [CLS], or nothing
    end: list[int]  # the end-of-document token or [SEP], or nothing

    def encode(self, chunk: TextChunk) -> Encoded:
        """See Task."""
        texts: list[str] = []
        bad: list[Bad] = []
        for found in parse(chunk, self.text_key):
            if isinstance(found, Bad):
                bad.append(found)
            else:
                texts.append(found)
        ids = [found for found in self.encoder.encode_batch(texts) if found]
        # A chunk of .txt may be part of a document, which then starts before it or ends after it.
        if chunk.kind != "txt" or chunk.start.offset == 0:
            ids = [self.begin + found for found in ids]
        if not chunk.open_end:
            ids = [found + self.end for found in ids]
        return Encoded(*_joined(ids, self.dtype), b"", len(texts) - len(ids), bad)

    def fingerprint(self) -> str:
        """See Task."""
        what = (self.text_key, self.begin, self.end, self.dtype.str)
        return _fingerprint(what, self.encoder)


@dataclass(frozen=True)
class ChatTask(Task):
    """Conversations, and prompts with completions."""

    encoder: ChatEncoder
    dtype: np.dtype[Any]

    def encode(self, chunk: TextChunk) -> Encoded:
        """See Task."""
        ids: list[list[int]] = []
        marks: list[list[int]] = []
        bad: list[Bad] = []
        forms = Counter[str]()
        for number, found in parse_objects(chunk):
            if isinstance(found, Bad):
                bad.append(found)
                continue
            try:
                sample = sample_of(found)
                documents = self.encoder.documents(sample)
            except NotChat as error:
                bad.append(Bad(number, str(error)))
                continue
            forms[sample.form] += 1
            for document, of_document in documents:
                ids.append(document)
                marks.append(of_document)
        return Encoded(*_joined(ids, self.dtype), _marks(marks), 0, bad, forms)

    def fingerprint(self) -> str:
        """See Task."""
        return self.encoder.fingerprint()


@dataclass(frozen=True)
class PairTask(Task):
    """Texts with their translations."""

    encoder: PairEncoder
    dtype: np.dtype[Any]

    def encode(self, chunk: TextChunk) -> Encoded:
        """See Task."""
        pairs: list[tuple[str, str]] = []
        bad: list[Bad] = []
        for row, line in parse_objects(chunk):
            pair = pair_of(line, row)
            if isinstance(pair, Bad):
                bad.append(pair)
            else:
                pairs.append(pair)
        found = self.encoder.encode(pairs)
        joined = _joined([ids for ids, _ in found], self.dtype)
        return Encoded(*joined, _marks([marks for _, marks in found]), 0, bad)

    def fingerprint(self) -> str:
        """See Task."""
        return _fingerprint(self.encoder)


@dataclass(frozen=True)
class LabelTask(Task):
    """Texts, each with a label."""

    encoder: Encoder
    dtype: np.dtype[Any]
    text_key: str
    label_key: str
    classes: list[str]
    begin: list[int]  # [CLS], or nothing
    end: list[int]  # the end-of-document token or [SEP], or nothing

    def encode(self, chunk: TextChunk) -> Encoded:
        """See Task."""
        texts: list[str] = []
        numbers: list[int] = []
        bad: list[Bad] = []
        for row, found in parse_objects(chunk):
            text = text_of(found, self.text_key, row)
            number = text if isinstance(text, Bad) else self._number(found, row)
            if isinstance(number, Bad):
                bad.append(number)
            elif isinstance(text, str):
                texts.append(text)
                numbers.append(number)
        found_ids = zip(self.encoder.encode_batch(texts), numbers, strict=True)
        kept = [(self.begin + ids + self.end, number) for ids, number in found_ids if ids]
        numbers_of_tokens = [[number] * len(ids) for ids, number in kept]
        joined = _joined([ids for ids, _ in kept], self.dtype)
        return Encoded(*joined, _marks(numbers_of_tokens), len(texts) - len(kept), bad)

    def _number(self, found: Any, row: int) -> int | Bad:
        """The number of a line's label."""
        label = found.get(self.label_key)
        if isinstance(label, bool) or not isinstance(label, str | int):
            return Bad(
                row, f"{json.dumps(self.label_key)}: must be a string or an integer, a label"
            )
        if str(label) not in self.classes:
            return Bad(row, f"{json.dumps(self.label_key)}: {label!r}: must be one of --classes")
        return self.classes.index(str(label))

    def fingerprint(self) -> str:
        """See Task."""
        what = (self.text_key, self.label_key, self.classes, self.begin, self.end, self.dtype.str)
        return _fingerprint(what, self.encoder)


def _joined(documents: list[list[int]], dtype: np.dtype[Any]) -> tuple[np.ndarray, bytes]:
    """The sizes of documents, and all their tokens one after another."""
    sizes = np.fromiter(map(len, documents), np.int64, len(documents))
    tokens = np.fromiter(chain.from_iterable(documents), dtype, int(sizes.sum()))
    return sizes, tokens.tobytes()


def _marks(documents: list[list[int]]) -> bytes:
    """One byte for each token, one document after another."""
    _, marks = _joined(documents, np.dtype(np.uint8))
    return marks


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(b"".join(map(pickle.dumps, parts))).hexdigest()
