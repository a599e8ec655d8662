"""Text files to a corpus, by several processes, and on from where it was after a kill.

One process reads chunks and writes tokens, in the order of the input; workers tokenize. At most a few chunks
a worker are under way, which bounds the memory. `documents.py` reads, `partial.py` keeps what is written
until it is whole, `indexed.py` has the form.
"""

import contextlib
import hashlib
import json
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megalite.data.chat import ChatEncoder
from megalite.data.chat_forms import NotChat, sample_of
from megalite.data.documents import (
    STANDARD_INPUT,
    Bad,
    Chunk,
    Kind,
    kind_of,
    parse,
    parse_objects,
    read_chunks,
    text_of,
    total_bytes,
)
from megalite.data.indexed import labels_prefix, marks_prefix, token_dtype
from megalite.data.pairs import PairEncoder, pair_of
from megalite.data.partial import Counts, Encoded, Partial
from megalite.data.progress import Progress
from megalite.data.tokenizer import Encoder, FastEncoder, Tokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError, MegaliteError
from megalite.inputs import reading

_CHUNKS_UNDER_WAY = 3  # a worker
MOST_CLASSES = 256  # a byte a token


class Task(ABC):
    """What a worker does with a chunk; it can be sent to another process."""

    dtype: np.dtype[Any]
    """Of the tokens."""

    @abstractmethod
    def encode(self, chunk: Chunk) -> Encoded:
        """Tokenize a chunk. A document without tokens is left out and counted."""

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

    def encode(self, chunk: Chunk) -> Encoded:
        """See Task."""
        texts: list[str] = []
        bad: list[Bad] = []
        for found in parse(chunk, self.text_key):
            if isinstance(found, Bad):
                bad.append(found)
            else:
                texts.append(found)
        ids = [found for found in self.encoder.encode_batch(texts) if found]
        # Else a piece of a document that has begun.
        if chunk.kind != "txt" or chunk.start.offset == 0:
            ids = [self.begin + found for found in ids]
        if not chunk.open_end:
            for found in ids:
                found += self.end
        return Encoded(*_joined(ids, self.dtype), b"", len(texts) - len(ids), bad)

    def fingerprint(self) -> str:
        """See Task."""
        what = (self.text_key, self.begin, self.end, self.dtype.str)
        return hashlib.sha256(pickle.dumps(what) + pickle.dumps(self.encoder)).hexdigest()


@dataclass(frozen=True)
class ChatTask(Task):
    """Conversations, and prompts with completions."""

    encoder: ChatEncoder
    dtype: np.dtype[Any]

    def encode(self, chunk: Chunk) -> Encoded:
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
        _, flat = _joined(marks, np.dtype(np.uint8))
        return Encoded(*_joined(ids, self.dtype), flat, 0, bad, forms)

    def fingerprint(self) -> str:
        """See Task."""
        return self.encoder.fingerprint()


@dataclass(frozen=True)
class PairTask(Task):
    """Texts with their translations."""

    encoder: PairEncoder
    dtype: np.dtype[Any]

    def encode(self, chunk: Chunk) -> Encoded:
        """See Task."""
        pairs: list[tuple[str, str]] = []
        bad: list[Bad] = []
        for row, line in parse_objects(chunk):
            pair = pair_of(line, row)
            bad.append(pair) if isinstance(pair, Bad) else pairs.append(pair)
        found = self.encoder.encode(pairs)
        _, flat = _joined([marks for _, marks in found], np.dtype(np.uint8))
        return Encoded(*_joined([ids for ids, _ in found], self.dtype), flat, 0, bad)

    def fingerprint(self) -> str:
        """See Task."""
        return hashlib.sha256(pickle.dumps(self.encoder)).hexdigest()


@dataclass(frozen=True)
class LabelTask(Task):
    """Texts with a label each."""

    encoder: Encoder
    dtype: np.dtype[Any]
    text_key: str
    label_key: str
    classes: list[str]
    begin: list[int]  # [CLS], or nothing
    end: list[int]  # the end-of-document token or [SEP], or nothing

    def encode(self, chunk: Chunk) -> Encoded:
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
        marks = [[number] * len(ids) for ids, number in kept]
        _, flat = _joined(marks, np.dtype(np.uint8))
        joined = _joined([ids for ids, _ in kept], self.dtype)
        return Encoded(*joined, flat, len(texts) - len(kept), bad)

    def _number(self, found: Any, row: int) -> int | Bad:
        """The number of a line's label."""
        label = found.get(self.label_key)
        if isinstance(label, bool) or not isinstance(label, str | int):
            return Bad(row, f"{json.dumps(self.label_key)} holds no label")
        if str(label) not in self.classes:
            return Bad(row, f"{json.dumps(self.label_key)}: {label!r}: is none of --classes")
        return self.classes.index(str(label))

    def fingerprint(self) -> str:
        """See Task."""
        what = self.text_key, self.label_key, self.classes, self.begin, self.end, self.dtype.str
        return hashlib.sha256(pickle.dumps(what) + pickle.dumps(self.encoder)).hexdigest()


def _joined(documents: list[list[int]], dtype: np.dtype[Any]) -> tuple[np.ndarray, bytes]:
    """Their sizes, and all of them one after another."""
    sizes = np.fromiter(map(len, documents), np.int64, len(documents))
    return sizes, np.fromiter(chain.from_iterable(documents), dtype, int(sizes.sum())).tobytes()


def preprocess(
    inputs: Sequence[str],
    tokenizer: str | Path,
    output: str | Path,
    text_key: str = "text",
    workers: int = 1,
    append_eod: bool = False,
    cls_sep: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    kind: Literal["jsonl", "txt", "parquet"] | None = None,
    paragraphs: bool = False,
    chat: bool = False,
    label_key: str | None = None,
    classes: Sequence[str] = (),
    template: str | None = None,
) -> Counts:
    """Write `output`.bin, .idx and .sha256 from the documents of `inputs`; `-` is standard input.

    `strict`: the first bad line raises DataError; otherwise bad lines are counted and the first few named.
    `kind` says what inputs hold whose names do not; `paragraphs`: blank lines part the documents of .txt.
    `append_eod`: each document ends by the tokenizer's end of document; `cls_sep`: it begins by [CLS] and ends by
    [SEP]. `chat`: lines hold conversations or prompts with completions (chat.py), and `output`.mask, a corpus of its
    own, marks with 1 the tokens that the loss counts. `label_key`: of the text's label, one of `classes`, whose number
    `output`.label, a corpus of its own, holds for each token; `output`.label.json has their names. `template`: lines
    hold texts with their translations (pairs.py), and `output`.mask marks the translations.
    An output that exists is refused, unless `overwrite`. Raises DataError with one line.
    """
    kinds: list[Kind] = [kind_of(path, kind, paragraphs) for path in inputs]
    size = total_bytes(inputs)
    loaded = load_tokenizer(tokenizer)
    dtype = token_dtype(loaded.vocabulary_size)
    forms = {"--chat": chat, "--label-key": label_key is not None, "--pairs": template is not None}
    form = _one_form(inputs, kinds, [name for name, asked in forms.items() if asked])
    _check_labels(label_key, classes)
    _check_ends(append_eod, cls_sep, chat, template)
    task: Task
    beside = None if form is None else marks_prefix(output)
    if template is not None:
        task = PairTask(PairEncoder.of(loaded, str(tokenizer), template), dtype)
    elif chat:
        task = ChatTask(ChatEncoder(loaded, str(tokenizer)), dtype)
    else:
        encoder, begin, end = _of_texts(loaded, tokenizer, append_eod, cls_sep)
        task = TextTask(encoder, dtype, text_key, begin, end)
        if label_key is not None:
            task = LabelTask(encoder, dtype, text_key, label_key, list(classes), begin, end)
            beside = labels_prefix(output)
    fingerprint = _fingerprint(inputs, kinds, task)
    with (
        Partial(output, fingerprint, overwrite, beside, classes) as partial,
        Progress(inputs, size) as progress,
    ):
        if not partial.written:
            chunks = read_chunks(inputs, kinds, text_key, partial.place)
            for chunk, encoded in _encoded(chunks, task, workers):
                partial.add(chunk, encoded, inputs[chunk.start.input], strict)
                done = partial.counts
                progress.show(chunk.start.input, chunk.read_bytes, done.documents, done.tokens)
            partial.finish(dtype)
        partial.give_names()
    return partial.counts


def _one_form(inputs: Sequence[str], kinds: Sequence[Kind], asked: Sequence[str]) -> str | None:
    """The option that says what the lines hold; None: texts."""
    for name in asked:
        if set(kinds) != {"jsonl"}:
            raise DataError(f"{inputs[0]}: must be lines of JSON for {name}")
    if len(asked) > 1:
        raise ConfigError(f"{asked[1]}: not with {asked[0]}")
    return asked[0] if asked else None


def _check_ends(append_eod: bool, cls_sep: bool, chat: bool, template: str | None) -> None:
    """Each form of a document has its own end."""
    if template is not None and (append_eod or cls_sep):
        option = "--append-eod" if append_eod else "--cls-sep"
        raise ConfigError(f"{option}: not with --pairs, which end by the end of document")
    if chat and cls_sep:
        raise ConfigError("--cls-sep: not with --chat, which is for decoders")
    if chat and append_eod:
        raise ConfigError(
            "--append-eod: not with --chat: the template ends messages, and completions are ended"
        )
    if append_eod and cls_sep:
        raise ConfigError("--append-eod: not with --cls-sep, which ends a document by [SEP]")


def _of_texts(
    loaded: Tokenizer, tokenizer: str | Path, append_eod: bool, cls_sep: bool
) -> tuple[Encoder, list[int], list[int]]:
    """(encoder, ids before a document, ids after it) of plain texts."""
    begin, end = _cls_and_sep(loaded, tokenizer) if cls_sep else ([], [])
    end = _end_of_document(loaded, tokenizer) if append_eod else end
    encoder = loaded.encoder()
    if cls_sep and isinstance(encoder, FastEncoder):
        encoder = encoder.splitting()  # "[SEP]" in a text ends no document
    return encoder, begin, end


def _check_labels(label_key: str | None, classes: Sequence[str]) -> None:
    if (label_key is None) != (not classes):
        raise ConfigError("--label-key: goes with --classes, the names of the labels")
    if label_key is None:
        return
    if not 2 <= len(classes) <= MOST_CLASSES or len(set(classes)) < len(classes):
        rule = f"must be 2 to {MOST_CLASSES} names, each once"
        raise ConfigError(f"--classes: {' '.join(classes)}: {rule}")


def _end_of_document(loaded: Tokenizer, folder: str | Path) -> list[int]:
    if loaded.eod_id is None:
        raise DataError(f"{folder}: has no end-of-sequence token, which --append-eod needs")
    return [loaded.eod_id]


def _cls_and_sep(loaded: Tokenizer, folder: str | Path) -> tuple[list[int], list[int]]:
    if loaded.cls_id is None or loaded.sep_id is None:
        raise DataError(f"{folder}: has no [CLS] and [SEP] tokens, which --cls-sep needs")
    return [loaded.cls_id], [loaded.sep_id]


def _fingerprint(inputs: Sequence[str], kinds: Sequence[str], task: Task) -> str:
    """Fingerprint of everything the output depends on; partial output with another one cannot be resumed."""
    files = [(path, kind, *_size_and_time(path)) for path, kind in zip(inputs, kinds, strict=True)]
    return hashlib.sha256(json.dumps([files, task.fingerprint()]).encode()).hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    if path == STANDARD_INPUT:
        return 0, time.time_ns()  # another stream each time: never resumed
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _encoded(chunks: Iterable[Chunk], task: Task, workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its tokens, in order; in this process where there is one worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if workers == 1:
        yield from ((chunk, _encode(task, chunk)) for chunk in chunks)
        return
    under_way: deque[tuple[Chunk, Future[Encoded]]] = deque()
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(task,)
    )
    try:
        for chunk in chunks:
            with _interrupts_later():
                under_way.append((chunk, pool.submit(_work, chunk)))
            while len(under_way) >= _CHUNKS_UNDER_WAY * workers or (
                under_way and under_way[0][1].done()
            ):
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()
    except BrokenProcessPool:
        raise MegaliteError(
            "a worker was killed (out of memory?): run the same command again to resume"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until the end of the block, and never reaches a process that is started in it: a worker would end
    with a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_task: Task  # of a worker process


def _start_worker(task: Task) -> None:
    global _task
    _task = task
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(chunk: Chunk) -> Encoded:
    return _encode(_task, chunk)


def _encode(task: Task, chunk: Chunk) -> Encoded:
    where = (
        f"--input: number {chunk.start.input + 1}, from line or document {chunk.start.number} on"
    )
    with reading(where, DataError):  # tokenizers may raise anything over a text
        return task.encode(chunk)
