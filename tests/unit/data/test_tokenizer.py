"""Tokenizers: transformers and sentencepiece give the same ids behind one interface; one-line errors."""

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megalite.data.tokenizer import FastEncoder, SentencePieceEncoder, load_tokenizer
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import DataError

PIECES = [
    "",
    " ",
    "  a ",
    "a",
    "\n",
    "\t x",
    "é漢🙂",
    "</s>",
    "x</s>",
    "▁",
    "\x00",
    "word. Word",
    "-" * 100,
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_transformers_and_sentencepiece_agree(
    tokenizers: dict[str, Path], texts: list[str], kind: str, model_type: str | None, tmp_path: Path
) -> None:
    """Also with a model's config beside it, which might make transformers convert the tokenizer."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizers[kind], folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    lines = [line for text in texts for line in text.split("\n\n")]
    for text in texts + lines + PIECES:
        ids = model.encode(text)
        assert theirs(text)["input_ids"] == theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == model.decode(ids) == text.replace("▁", " ")
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_one_interface_for_both(
    tokenizers: dict[str, Path], texts: list[str], kind: str, tmp_path: Path
) -> None:
    whole = load_tokenizer(tokenizers[kind])
    shutil.copy(tokenizers[kind] / "tokenizer.model", tmp_path)
    alone = load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("a b") == alone.encode("a b")
    for tokenizer in (whole, alone):
        assert (tokenizer.vocabulary_size, tokenizer.bos_id, tokenizer.eod_id) == (500, 1, 2)
        assert tokenizer.encode_batch(texts) == [alone.encode(text) for text in texts]
        assert tokenizer.decode([*tokenizer.encode("x  y"), 2, 10**6]) == "x  y"
        sent = pickle.loads(pickle.dumps(tokenizer.encoder()))
        assert (
            sent.encode_batch(texts) == tokenizer.encode_batch(texts)
            and sent.encode_batch([]) == []
        )
    assert whole.decode([*whole.encode("x"), 2], skip_special_tokens=False) == "x</s>"


def random_texts(count: int) -> Iterator[str]:
    """Spaces, letters of many scripts, controls, private characters and special tokens, mixed."""
    chance = random.Random(3)
    ranges = [
        (32, 127),
        (0, 32),
        (0xA0, 0x3000),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1F700),
        (0xE000, 0xF000),
    ]
    words = [" ", "  ", "▁", "</s>", "<s>", "<unk>", "<0x0A>", "def ", "    ", "~~~~"]
    for _ in range(count):
        weights = [chance.random() ** 3 for _ in range(len(ranges) + 4)]
        picks = chance.choices([*ranges, *[None] * 4], weights, k=chance.randrange(1, 60))
        yield "".join(
            chr(chance.randrange(*pick)) if pick else chance.choice(words) for pick in picks
        )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_has_the_same_ids(tokenizers: dict[str, Path], kind: str) -> None:
    texts = list(random_texts(3000))
    theirs = FastEncoder(AutoTokenizer.from_pretrained(tokenizers[kind]).backend_tokenizer, True)
    model = load_tokenizer(tokenizers[kind] / "tokenizer.model")
    assert theirs.encode_batch(texts) == model.encode_batch(texts)


def test_the_model_encodes_for_a_folder_only_while_it_is_as_it_was_checked(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    assert isinstance(load_tokenizer(tokenizers["bpe"]).encoder(), SentencePieceEncoder)
    folder = tmp_path / "changed"
    shutil.copytree(tokenizers["bpe"], folder)
    inner = AutoTokenizer.from_pretrained(folder)
    inner.add_tokens(["import os"])
    inner.save_pretrained(folder)
    changed = load_tokenizer(folder)
    assert isinstance(changed.encoder(), FastEncoder)
    assert changed.encode("import os") == [500] and changed.vocabulary_size == 501


def test_mistakes_are_one_line(
    text_file: Path, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.model").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for name, line in (
        ("absent", "no such folder"),
        ("torn", "cannot be loaded as a tokenizer"),
        ("bad", "is not a sentencepiece model"),
        ("empty", "contains no tokenizer"),
    ):
        with pytest.raises(DataError, match=line) as raised:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(raised.value) and name in str(raised.value)
    with pytest.raises(DataError, match="already exists"):
        train_tokenizer([str(text_file)], 500, "bpe", tokenizers["bpe"])
    with pytest.raises(DataError, match=r"--vocab-size: 100000: must be at most \d+ for this text"):
        train_tokenizer([str(text_file)], 100_000, "unigram", tmp_path / "large")
    assert not (tmp_path / "large").exists()
