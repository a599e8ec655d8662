"""Tokenizes text files into a corpus with several processes; after a kill it resumes where it stopped.

One process reads chunks and writes tokens in the order of the input; workers (`workers.py`) tokenize. `documents.py`
reads, `tasks.py` tokenizes, `partial.py` keeps the output until it is complete, `indexed.py` defines its format.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megalite.data.chat_encoder import ChatEncoder
from megalite.data.documents import STANDARD_INPUT, Kind, kind_of, read_chunks, total_bytes
from megalite.data.indexed import labels_prefix, marks_prefix, token_dtype
from megalite.data.pairs import PairEncoder
from megalite.data.partial import Counts, Partial
from megalite.data.progress import Progress
from megalite.data.tasks import ChatTask, LabelTask, PairTask, Task, TextTask
from megalite.data.tokenizer import FastEncoder, Tokenizer, load_tokenizer
from megalite.data.workers import tokenized
from megalite.errors import ConfigError, DataError

MOST_CLASSES = 256  # a label takes one byte per token


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
    """Writes `output`.bin, .idx and .sha256 from the documents of `inputs`; `-` is standard input.

    strict: the first bad line raises DataError; otherwise bad lines are counted and the first few are printed. kind:
    format of inputs whose names do not tell it. paragraphs: blank lines separate the documents of .txt. append_eod:
    each document ends with the tokenizer's end-of-document token. cls_sep: it starts with [CLS] and ends with [SEP].
    chat: lines contain conversations, or prompts with completions (chat_encoder.py), and a second corpus,
    `output`.mask, marks with 1 the tokens that count in the loss. label_key: key of the text's label, one of `classes`;
    a second corpus, `output`.label, has the label's number for each token, and `output`.label.json the names. template:
    lines contain texts with their translations (pairs.py), and `output`.mask marks the translations.

    Raises DataError for bad inputs, and if the output exists and `overwrite` is false; ConfigError for options that do
    not go together.
    """
    kinds: list[Kind] = [kind_of(path, kind, paragraphs) for path in inputs]
    size = total_bytes(inputs)
    loaded = load_tokenizer(tokenizer)
    forms = {"--chat": chat, "--label-key": label_key is not None, "--pairs": template is not None}
    form = _one_form(inputs, kinds, [option for option, asked in forms.items() if asked])
    _check_labels(label_key, classes)
    _check_ends(append_eod, cls_sep, chat, template)
    folder, dtype = str(tokenizer), token_dtype(loaded.vocabulary_size)
    task: Task
    if template is not None:
        task = PairTask(PairEncoder.of(loaded, folder, template), dtype)
    elif chat:
        task = ChatTask(ChatEncoder(loaded, folder), dtype)
    else:
        task = _text_task(loaded, folder, text_key, label_key, classes, append_eod, cls_sep)
    fingerprint = _fingerprint(inputs, kinds, task)
    beside = _beside(output, form)
    with (
        Partial(output, fingerprint, overwrite, beside, classes) as partial,
        Progress(inputs, size) as progress,
    ):
        if not partial.written:
            chunks = read_chunks(inputs, kinds, text_key, partial.place)
            for chunk, encoded in tokenized(chunks, task, workers):
                partial.add(chunk, encoded, inputs[chunk.start.input], strict)
                done = partial.counts
                progress.show(chunk.start.input, chunk.read_bytes, done.documents, done.tokens)
            partial.finish(dtype)
        partial.give_names()
    return partial.counts


def _one_form(inputs: Sequence[str], kinds: Sequence[Kind], asked: Sequence[str]) -> str | None:
    """The option that gives the content of the lines; None: texts."""
    for name in asked:
        if set(kinds) != {"jsonl"}:
            raise DataError(f"{inputs[0]}: must be lines of JSON for {name}")
    if len(asked) > 1:
        raise ConfigError(f"{asked[1]}: not with {asked[0]}")
    return asked[0] if asked else None


def _beside(output: str | Path, form: str | None) -> str | None:
    """The prefix of the corpus beside the output, of labels or marks; None if there is none."""
    if form is None:
        return None
    return labels_prefix(output) if form == "--label-key" else marks_prefix(output)


def _check_ends(append_eod: bool, cls_sep: bool, chat: bool, template: str | None) -> None:
    """Raises ConfigError for two options that would end documents differently."""
    if template is not None and (append_eod or cls_sep):
        option = "--append-eod" if append_eod else "--cls-sep"
        raise ConfigError(
            f"{option}: not with --pairs, which ends documents with the end-of-document token"
        )
    if chat and cls_sep:
        raise ConfigError("--cls-sep: not with --chat, which is for decoders")
    if chat and append_eod:
        raise ConfigError(
            "--append-eod: not with --chat, which already ends messages and completions"
        )
    if append_eod and cls_sep:
        raise ConfigError("--append-eod: not with --cls-sep, which ends documents with [SEP]")


def _text_task(
    loaded: Tokenizer,
    folder: str,
    text_key: str,
    label_key: str | None,
    classes: Sequence[str],
    append_eod: bool,
    cls_sep: bool,
) -> Task:
    """The task for plain texts, which have a label each if there is a `label_key`."""
    dtype = token_dtype(loaded.vocabulary_size)
    begin, end = _cls_and_sep(loaded, folder) if cls_sep else ([], [])
    end = _end_of_document(loaded, folder) if append_eod else end
    encoder = loaded.encoder()
    if cls_sep and isinstance(encoder, FastEncoder):
        encoder = encoder.splitting()  # "[SEP]" in a text does not end a document
    if label_key is None:
        return TextTask(encoder, dtype, text_key, begin, end)
    return LabelTask(encoder, dtype, text_key, label_key, list(classes), begin, end)


def _check_labels(label_key: str | None, classes: Sequence[str]) -> None:
    if (label_key is None) != (not classes):
        raise ConfigError("--label-key: needs --classes, the names of the labels, and vice versa")
    if label_key is None:
        return
    if not 2 <= len(classes) <= MOST_CLASSES or len(set(classes)) < len(classes):
        rule = f"must be 2 to {MOST_CLASSES} different names"
        raise ConfigError(f"--classes: {' '.join(classes)}: {rule}")


def _end_of_document(loaded: Tokenizer, folder: str) -> list[int]:
    if loaded.eod_id is None:
        raise DataError(f"{folder}: has no end-of-sequence token, which --append-eod needs")
    return [loaded.eod_id]


def _cls_and_sep(loaded: Tokenizer, folder: str) -> tuple[list[int], list[int]]:
    if loaded.cls_id is None or loaded.sep_id is None:
        raise DataError(f"{folder}: has no [CLS] and [SEP] tokens, which --cls-sep needs")
    return [loaded.cls_id], [loaded.sep_id]


def _fingerprint(inputs: Sequence[str], kinds: Sequence[str], task: Task) -> str:
    """Fingerprint of everything the output depends on; partial output with another one cannot be resumed."""
    files = [(path, kind, *_size_and_time(path)) for path, kind in zip(inputs, kinds, strict=True)]
    return hashlib.sha256(json.dumps([files, task.fingerprint()]).encode()).hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    if path == STANDARD_INPUT:
        return 0, time.time_ns()  # a new stream each time, never resumed
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
