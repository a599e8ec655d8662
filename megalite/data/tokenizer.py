"""A small common interface to tokenizers: a Hugging Face folder or a sentencepiece model.

The ids of a text are those of the text alone: no special token is added before or after it. `tokenizer_training.py`
trains new tokenizers.
"""

import copy
import hashlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece

from megalite import other_formats
from megalite.errors import DataError
from megalite.inputs import check_links, read_json_object, reading

SENTENCEPIECE_FILE = "tokenizer.model"
BYTES, SPACE = "Ġ", "▁"  # a space in byte-level vocabularies, and in those of sentencepiece
_HIGHEST_ID = 10**7
_LONG_NUMBER = re.compile(rb"\d{8}")
EQUAL_FILE = "sentencepiece_equal.json"
_COMPARED = (SENTENCEPIECE_FILE, "tokenizer.json", "tokenizer_config.json")


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocabulary_size: int
    """All ids are below this."""
    bos_id: int | None
    """The token that begins a text, if there is one."""
    eod_id: int | None
    """The token that ends a document (Hugging Face's eos), if there is one."""
    mask_id: int | None
    """The token that replaces a masked one, if there is one."""
    cls_id: int | None
    sep_id: int | None
    """The tokens that begin and end a text for an encoder, if there are any."""
    special_ids: frozenset[int]
    """Special tokens, which ordinary text never contains."""

    @property
    @abstractmethod
    def word_mark(self) -> str | None:
        """How tokens show where words begin. BYTES or SPACE: the space before a word; another string, such as "##": the
        prefix of tokens that continue a word. None: they do not show it."""

    @abstractmethod
    def pieces(self) -> list[str]:
        """The string of each id in the vocabulary; "" for an id without one."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        """The id of each token, given as its string in the vocabulary; None if it is not in the vocabulary."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; ids outside the vocabulary are skipped."""

    @abstractmethod
    def encoder(self) -> "Encoder":
        """An object that only encodes: small, quick to load and picklable."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]


class Encoder(ABC):
    """The part of a tokenizer that worker processes need; picklable."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""


class FastEncoder(Encoder):
    """The `tokenizers.Tokenizer` inside a Hugging Face tokenizer, without transformers around it."""

    def __init__(self, inner: Any, split_special_tokens: bool) -> None:
        self._inner, self._split = inner, split_special_tokens
        inner.encode_special_tokens = split_special_tokens  # pickling does not preserve this
        inner.no_truncation()
        inner.no_padding()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [
            found.ids for found in self._inner.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def splitting(self) -> "FastEncoder":
        """An encoder that treats a special token's name in a text as ordinary text."""
        return FastEncoder(self._inner, split_special_tokens=True)

    def __reduce__(self) -> Any:
        return FastEncoder, (self._inner, self._split)


class SlowEncoder(Encoder):
    """A slow Hugging Face tokenizer, written in Python."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._inner(list(texts), add_special_tokens=False)["input_ids"] if texts else []


class SentencePieceEncoder(Encoder):
    """A sentencepiece model."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._inner.encode(list(texts), num_threads=1)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer loaded by `transformers.AutoTokenizer`."""

    def __init__(self, inner: Any, equal_model: Path | None = None) -> None:
        """equal_model: a sentencepiece model that gives the same ids, but faster."""
        self.inner = inner
        self._equal = None if equal_model is None else SentencePieceTokenizer(equal_model).encoder()
        self.vocabulary_size = max(inner.get_vocab().values()) + 1
        self.bos_id = inner.bos_token_id
        self.eod_id = inner.eos_token_id
        self.mask_id = inner.mask_token_id
        self.cls_id, self.sep_id = inner.cls_token_id, inner.sep_token_id
        self.special_ids = frozenset(inner.all_special_ids)
        self._encoder = self.encoder()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        # A malformed file may raise an exception only for some texts.
        with reading(self.inner.name_or_path, DataError):
            return self._encoder.encode_batch(texts)

    def encoder(self) -> Encoder:
        """See Tokenizer."""
        if self._equal is not None:
            return self._equal
        fast = getattr(self.inner, "backend_tokenizer", None)
        if fast is None:
            return SlowEncoder(self.inner)
        return FastEncoder(
            copy.deepcopy(fast), bool(getattr(self.inner, "split_special_tokens", False))
        )

    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        """See Tokenizer."""
        vocabulary: dict[str, int] = self.inner.get_vocab()
        return [vocabulary.get(token) for token in tokens]

    @property
    def word_mark(self) -> str | None:
        """See Tokenizer; None for a slow tokenizer."""
        fast = getattr(self.inner, "backend_tokenizer", None)
        if fast is None:
            return None
        settings = json.loads(fast.to_str())
        model = settings["model"]
        if model.get("end_of_word_suffix"):
            return None
        if prefix := model.get("continuing_subword_prefix"):
            return prefix
        parts = ("normalizer", "pre_tokenizer", "decoder")
        around = json.dumps([settings.get(part) for part in parts], ensure_ascii=False)
        if "ByteLevel" in around:
            return BYTES
        return SPACE if SPACE in around else None

    def pieces(self) -> list[str]:
        """See Tokenizer."""
        found = [""] * self.vocabulary_size
        for piece, number in self.inner.get_vocab().items():
            found[number] = piece
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids, without clean-up of spaces."""
        known = [int(i) for i in ids if 0 <= i < self.vocabulary_size]
        return self.inner.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model without a Hugging Face tokenizer."""

    def __init__(self, model_file: Path) -> None:
        try:
            self._inner: Any = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError):
            raise DataError(f"{model_file}: is not a sentencepiece model") from None
        self.vocabulary_size = len(self._inner)
        self.bos_id, self.eod_id = (
            i if i >= 0 else None for i in (self._inner.bos_id(), self._inner.eos_id())
        )
        self.mask_id = self.cls_id = self.sep_id = None
        ids = range(self.vocabulary_size)
        self.special_ids = frozenset(
            i for i in ids if self._inner.is_control(i) or self._inner.is_unknown(i)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return self.encoder().encode_batch(texts)

    def encoder(self) -> Encoder:
        """See Tokenizer."""
        return SentencePieceEncoder(self._inner)

    def ids_of(self, tokens: Sequence[str]) -> list[int | None]:
        """See Tokenizer."""
        found = [self._inner.piece_to_id(token) for token in tokens]
        pairs = zip(found, tokens, strict=True)
        return [i if self._inner.id_to_piece(i) == token else None for i, token in pairs]

    @property
    def word_mark(self) -> str | None:
        """See Tokenizer."""
        return SPACE

    def pieces(self) -> list[str]:
        """See Tokenizer."""
        return [self._inner.id_to_piece(number) for number in range(self.vocabulary_size)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; control tokens are always skipped."""
        return self._inner.decode([int(i) for i in ids if 0 <= i < self.vocabulary_size])


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads a folder that transformers supports, a folder with only a `tokenizer.model`, or such a file.

    No code from the folder is run and nothing is downloaded. Raises DataError if it cannot be loaded.
    """
    with reading(folder, DataError):
        return _loaded(Path(folder))


def _loaded(path: Path) -> Tokenizer:
    if found := other_formats.tokenizer(path):
        raise DataError(f"{path}: {found}")
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder: must be the folder of a tokenizer")
    check_links(path, DataError)
    model_file = path / SENTENCEPIECE_FILE
    if model_file.is_file() and not any(
        (path / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")
    ):
        return SentencePieceTokenizer(model_file)
    tokenizer = HuggingFaceTokenizer(
        _from_transformers(path), model_file if _is_equal(path) else None
    )
    # Use it once here, because malformed settings raise an exception at the first use.
    tokenizer.decode(tokenizer.inner("a")["input_ids"])
    return tokenizer


def record_equal(folder: Path) -> None:
    """Records that a folder's sentencepiece model gives the same ids as its other files in their current state. Text is
    then encoded by that model, 1.5 (bpe) to 5 (unigram) times as fast."""
    (folder / EQUAL_FILE).write_text(json.dumps(_hashes(folder), indent=1) + "\n")


def _is_equal(folder: Path) -> bool:
    try:
        return json.loads((folder / EQUAL_FILE).read_text()) == _hashes(folder)
    except (OSError, ValueError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _COMPARED}


def _check_ids(file: Path) -> None:
    """Raises DataError for an implausibly high id: the tokenizers library allocates a table up to the highest id."""
    if not file.is_file() or not _LONG_NUMBER.search(file.read_bytes()):
        return
    model = read_json_object(file, DataError).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and number > _HIGHEST_ID:
            raise DataError(
                f"{file}: token {token!r} has the id {number}: must be at most {_HIGHEST_ID}"
            )


def _from_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer  # takes seconds to import

    known = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((path / name).is_file() for name in known):
        raise DataError(
            f"{path}: contains no tokenizer: must have one of {', '.join(known)}, {SENTENCEPIECE_FILE}"
        )
    config = path / "tokenizer_config.json"
    _check_ids(path / "tokenizer.json")
    try:
        if config.is_file():
            json.loads(config.read_text(encoding="utf-8"))
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # the tokenizers library raises Exception itself for a file that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot be loaded as a tokenizer: {reason[:200]}") from None


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Context manager that gives the path of a folder to create, which is renamed to `output` when the block ends.
    Raises DataError if `output` exists and is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: already exists; choose a new folder or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / "folder"
        yield folder
        os.chmod(folder, 0o755)
        if output.is_dir():
            output.rmdir()
        os.replace(folder, output)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt as transformers gives them to a model: with the token that the tokenizer adds before a text,
    if it adds one."""
    ids = tokenizer.encode(prompt)
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.bos_id is not None:
        first = tokenizer.inner(prompt)["input_ids"][:1]
        if first == [tokenizer.bos_id] and ids[:1] != first:
            return first + ids
    return ids


def continuation(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop: Collection[int] = (),
    is_source: bool = False,
) -> str:
    """The text that `tokens` add to the prompt's text. They are decoded together, since a token's text depends on its
    neighbours. is_source: whether the prompt is an encoder-decoder's source, so that `tokens` are a separate text."""
    prompt = () if is_source else prompt
    kept = [token for token in tokens if token not in stop]
    start, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *kept])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(kept)
