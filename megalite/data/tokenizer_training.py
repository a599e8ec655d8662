"""Trains a sentencepiece model and converts it to a folder that transformers loads, with the same ids.

transformers' own conversion loses some leading spaces, so the `tokenizers` object is built here from the model's
pieces, and compared with the model on the training text before the folder is renamed. Text is not normalised: every
space is kept, and unknown characters are encoded as bytes.
"""

import functools
import importlib
import io
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers

from megalite.data.documents import read_texts
from megalite.data.tokenizer import (
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    new_folder,
    record_equal,
)
from megalite.errors import DataError

MAX_SENTENCES = 1_000_000
_LONGEST_LINE = 16_384  # bytes; sentencepiece skips longer sentences
_CHECKED_CHARACTERS = 1 << 24
_TOO_LARGE = re.compile(r"Vocabulary size too high.* value <= (\d+)")  # sentencepiece's messages
_TOO_SMALL = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_LEAST_PIECES = 3 + 256 + 1  # <unk>, <s>, </s>; one for each byte; a character
_SCORE_STEP = 1 / 16
# The score of pieces that text must not match: any path over ordinary pieces has a better score.
_NEVER = -1000.0
_AWKWARD = [
    "",
    " ",
    "  a ",
    "\n",
    "\r\n\n  x",
    "\t",
    "é漢🙂",
    "<s>a</s>",
    "<unk>",
    "<0x0A>",
    "▁",
    "a▁b",
    "\x00",
    "ﬁ Å",
]


class VocabularyTooLarge(DataError):
    """A text gives fewer different pieces than requested. most: the largest possible vocabulary size."""

    def __init__(self, requested: int, most: int) -> None:
        super().__init__(f"--vocab-size: {requested}: must be at most {most} for this text")
        self.most = most


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    model_type: str,
    output: str | Path,
    text_key: str = "text",
    max_sentences: int = MAX_SENTENCES,
) -> None:
    """Trains on the documents of `inputs` and writes the folder `output`: tokenizer.json, its config, and the
    sentencepiece model itself.

    At most `max_sentences` lines are kept in memory, sampled evenly from all. Raises DataError if the output exists or
    an input cannot be read; VocabularyTooLarge if the text cannot fill the vocabulary.
    """
    bad: list[str] = []
    with new_folder(Path(output)) as folder:
        model = folder.parent / SENTENCEPIECE_FILE
        texts = read_texts(inputs, text_key, bad.append)
        check_some_text(inputs, text_key)
        model.write_bytes(_trained(texts, vocab_size, model_type, max_sentences))
        export_sentencepiece(model, folder)
        _compare(model, folder, itertools.chain(_AWKWARD, read_texts(inputs, text_key)))
        record_equal(folder)
    if bad:
        print(f"{len(bad)} bad lines skipped, the first: {bad[0]}", file=sys.stderr)


def check_some_text(inputs: Sequence[str], text_key: str) -> None:
    """Raises DataError if the inputs contain no text."""
    if next(_lines(read_texts(inputs, text_key)), None) is None:
        others = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
        raise DataError(f"{inputs[0]}{others}: contains no text")


def _trained(texts: Iterable[str], vocab_size: int, model_type: str, max_sentences: int) -> bytes:
    if vocab_size < _LEAST_PIECES:
        raise DataError(f"--vocab-size: {vocab_size}: must be at least {_LEAST_PIECES}")
    model = io.BytesIO()
    train = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=_lines(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        input_sentence_size=max_sentences,
        shuffle_input_sentence=True,
        max_sentence_length=_LONGEST_LINE,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=len(os.sched_getaffinity(0)),
        minloglevel=2,
    )
    try:
        _beside(train)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        if most := _TOO_LARGE.search(reason):
            raise VocabularyTooLarge(vocab_size, int(most[1])) from None
        if least := _TOO_SMALL.search(reason):
            rule = f"must be at least {least[1]} for this text, a piece for each of its characters"
            raise DataError(f"--vocab-size: {vocab_size}: {rule}") from None
        raise DataError(
            f"--vocab-size {vocab_size}: sentencepiece cannot train it on this text: {reason}"
        ) from None
    return _with_exact_scores(model.getvalue())


def _beside(call: Callable[[], Any]) -> None:
    """Makes a call that does not return to Python for minutes, in a thread, so that the main thread handles Ctrl-C."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    future.result()


def _with_exact_scores(model: bytes) -> bytes:
    """A unigram model with its scores rounded to sixteenths.

    sentencepiece sums scores in 32 bits, `tokenizers` in 64, so rounding would decide between paths of equal score,
    such as those through a row of dashes. Sixteenths are summed without rounding, up to about 130,000 tokens; the
    segmentation hardly changes (0.004 % more tokens on 1 MB of Python sources).
    """
    proto = _proto(model)
    if not _is_bpe(proto):
        for piece in proto.pieces:
            piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    return proto.SerializeToString()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without newlines, long ones in parts. NUL is replaced, because sentencepiece reserves it."""
    step = _LONGEST_LINE // 4  # characters of at most four bytes
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), step):
                yield line[start : start + step].replace("\0", " ")


def export_sentencepiece(model_file: Path, folder: Path) -> None:
    """Writes a sentencepiece model as a folder that `AutoTokenizer` loads."""
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    special = {
        "unk_token": model.unk_id(),
        "bos_token": model.bos_id(),
        "eos_token": model.eos_id(),
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast(model),
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a text is ordinary text, as in sentencepiece, and ends no document
        **{name: model.id_to_piece(i) for name, i in special.items() if i >= 0},
    )
    tokenizer.save_pretrained(folder)
    shutil.copy(model_file, folder / SENTENCEPIECE_FILE)


def _fast(model: Any) -> Any:
    """The `tokenizers.Tokenizer` with a sentencepiece model's pieces and rules."""
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    plain = [
        not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        for i in range(len(model))
    ]
    scores = [model.get_score(i) for i in range(len(model))]
    if _is_bpe(_proto(model.serialized_model_proto())):
        ids = {piece: i for i, piece in enumerate(pieces)}
        merges = []  # sorted by the score of the merged piece, then by the ids of its parts
        for piece, score, use in zip(pieces, scores, plain, strict=True):
            for cut in range(1, len(piece)) if use else ():
                left, right = piece[:cut], piece[cut:]
                if left in ids and right in ids:
                    merges.append((-score, ids[left], ids[right], (left, right)))
        kind = models.BPE(
            ids,
            [pair for *_, pair in sorted(merges)],
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    else:
        matched = [score if use else _NEVER for score, use in zip(scores, plain, strict=True)]
        vocabulary = list(zip(pieces, matched, strict=True))
        kind = models.Unigram(vocabulary, unk_id=model.unk_id(), byte_fallback=True)
    tokenizer = Tokenizer(kind)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _proto(model: bytes) -> Any:
    """A model's protocol buffer, with its pieces and its training settings."""
    # The module creates its names at run time, so type checkers do not know them.
    pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    return pb2.ModelProto.FromString(model)


def _is_bpe(proto: Any) -> bool:
    return proto.trainer_spec.model_type == proto.trainer_spec.BPE


def _compare(model_file: Path, folder: Path, texts: Iterable[str]) -> None:
    """Compares the exported folder with the model. Raises AssertionError with the first text that differs, since that
    is not a user's mistake."""
    from transformers import AutoTokenizer

    exported = HuggingFaceTokenizer(
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    )
    reference = SentencePieceTokenizer(model_file)
    characters = 0
    for text in texts:
        expected, found = reference.encode(text), exported.encode(text)
        if expected != found:
            raise AssertionError(f"{folder}: differs from {model_file} for the text {text[:200]!r}")
        characters += len(text)
        if characters > _CHECKED_CHARACTERS:
            return
