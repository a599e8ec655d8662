"""Whole words: which tokens form a word for each kind of tokenizer; masks cover all of them or none."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megalite.config import load_config
from megalite.data.indexed import IndexedCorpus
from megalite.data.loader import UNCOUNTED, TrainData, ValidData
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import Tokenizer as Ours
from megalite.data.tokenizer import load_tokenizer
from megalite.data.wordpiece import train_wordpiece
from megalite.data.words import Words, words_of
from megalite.errors import ConfigError
from megalite.training.fingerprint import difference, fingerprint
from tests.unit.data.corpora import data_section

SIZE, LENGTH = 400, 48
TEXT = "don't (überlong) identifiers9\n\n\tnaïve — x «return» resharding,forward"


def byte_level(text_file: Path, folder: Path) -> Path:
    """A tokenizer like RoBERTa's and ModernBERT's: byte-level BPE with a mask token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<s>", "</s>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(text_file)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(
    text_file: Path, tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("words")
    train_wordpiece([str(text_file)], SIZE, base / "wordpiece", lowercase=True)
    return tokenizers | {
        "wordpiece": base / "wordpiece",
        "byte level": byte_level(text_file, base / "bytes"),
        "sentencepiece": tokenizers["unigram"] / "tokenizer.model",
    }


def table(tokenizer: Ours, ids: int | None = None) -> Words:
    found = words_of(tokenizer, ids or tokenizer.vocabulary_size, [])
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "byte level", "bpe", "unigram", "sentencepiece"])
def test_a_word_s_tokens_hold_its_letters_and_no_other_s(
    kind: str, folders: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(folders[kind])
    tokens = np.array([tokenizer.encode(TEXT)])
    starts = table(tokenizer).starts(tokens, None)[0]
    words = [tokenizer.decode(tokens[0, starts == start]) for start in np.unique(starts)]
    letters = [word for text in words for word in re.findall(r"[^\W_]+", text)]
    wanted = re.findall(r"[^\W_]+", TEXT.replace("ü", "u").replace("ï", "i"))
    plain = [word.replace("ü", "u").replace("ï", "i") for word in letters]
    # sentencepiece's bytes of a character, and WordPiece's unknown tokens, have no letters of their own.
    if kind == "wordpiece":
        wanted = [word for word in wanted if word in plain]
        assert {"don", "t", "identifiers9", "return", "resharding", "forward"} <= set(plain)
    assert plain == wanted
    assert any(len(tokens[0, starts == start]) > 1 for start in np.unique(starts))


def test_a_special_token_and_an_id_without_a_token_belong_to_no_word(
    folders: dict[str, Path],
) -> None:
    tokenizer = load_tokenizer(folders["byte level"])
    of = table(tokenizer, SIZE + 10)
    letter = tokenizer.encode("e")[0]
    tokens = np.array([[letter, letter, 1, letter, SIZE + 5, letter, letter]])
    assert of.starts(tokens, None).tolist() == [[0, 0, 2, 3, 4, 5, 5]]
    documents = np.array([[0, 1, 1, 1, 1, 1, 2]])
    assert of.starts(tokens, documents).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    # A sample that starts within a word: the rest of the word counts as a word.
    assert of.starts(tokens[:, 1:], None)[0, 0] == 0
    assert of.cut(tokens[0, :2], tokens[0, 1:3]).tolist() == [True, False]


@pytest.fixture(scope="module")
def prefix(
    folders: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    preprocess([str(text_file)], folders["wordpiece"], prefix, cls_sep=True)
    return str(prefix)


def training(prefix: str, folder: Path, seed: int = 7, **keys: Any) -> TrainData:
    objective = {"masked": 0.15, "whole_word": True} | keys.pop("objective", {})
    data = data_section([prefix], LENGTH, tokenizer=str(folder), objective=objective, **keys)
    return TrainData(data, seed, SIZE)


def test_all_tokens_of_a_word_are_masked_or_none(prefix: str, folders: dict[str, Path]) -> None:
    folder, positions = folders["wordpiece"], range(3000)
    whole = training(prefix, folder).batch(positions)
    plain = training(prefix, folder, objective={"masked": 1e-9}).batch(positions).tokens
    single = training(prefix, folder, objective={"whole_word": False}).batch(positions)
    tokenizer = load_tokenizer(folder)
    starts = table(tokenizer).starts(plain, None)
    possible = ~np.isin(plain, sorted(tokenizer.special_ids))
    chosen = whole.labels != UNCOUNTED
    assert not (chosen & ~possible).any() and (whole.labels[chosen] == plain[chosen]).all()
    # A word is masked exactly if its first token alone would be.
    first = np.take_along_axis(single.labels != UNCOUNTED, starts, axis=1)
    assert (chosen[possible] == first[possible]).all()
    # The share of tokens: each word is drawn once and counts with all of its tokens.
    words = (np.arange(len(plain))[:, None] * LENGTH + starts)[possible]
    _, lengths = np.unique(words, return_counts=True)
    assert lengths.max() > 5
    deviation = (0.15 * 0.85 * (lengths.astype(float) ** 2).sum()) ** 0.5
    assert abs(chosen.sum() - 0.15 * possible.sum()) <= 4 * deviation
    assert deviation > 1.3 * (0.15 * 0.85 * possible.sum()) ** 0.5


def test_the_log_counts_words_at_the_edges_of_windows(
    prefix: str, folders: dict[str, Path]
) -> None:
    (note,) = training(prefix, folders["wordpiece"]).notes
    found = re.fullmatch(
        rf"data: {prefix}: about (\d+)% of the windows begin within a word, whose two parts .*",
        note,
    )
    corpus, of = IndexedCorpus(prefix), table(load_tokenizer(folders["wordpiece"]))
    tokens = corpus.read(0, corpus.num_tokens)
    share = (~of.begins[tokens]).mean()
    assert found is not None and abs(int(found[1]) / 100 - share) < 0.2 and 0.2 < share < 0.8
    packed = training(prefix, folders["wordpiece"], samples="packed", reset_attention=True)
    assert not any("within a word" in note for note in packed.notes)
    assert training(prefix, folders["wordpiece"], objective={"whole_word": False}).notes == []


def test_another_tokenizer_s_words_are_another_run(
    prefix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def run(tokenizer: Path, objective: dict[str, Any]) -> Any:
        keys = [f'megalite.data.train=["{prefix}"]', f"megalite.data.tokenizer={tokenizer}"]
        keys += [f"megalite.data.objective={json.dumps(objective)}"]
        return load_config("ds_configs/tiny_cpu.json", keys).resolve(8)

    whole, single = {"masked": 0.15, "whole_word": True}, {"masked": 0.15}
    was = fingerprint(run(folders["wordpiece"], whole))
    assert difference(was, run(folders["wordpiece"], whole)) is None
    given, theirs = difference(was, run(folders["byte level"], whole)) or ("", "")
    assert given.startswith('megalite.data.tokenizer: {"words_sha256"') and theirs != given
    given, _ = difference(was, run(folders["wordpiece"], single)) or ("", "")
    assert given.startswith('megalite.data.objective: {"masked": 0.15')
    # A checkpoint from before whole-word masking existed.
    old = fingerprint(run(folders["wordpiece"], single))
    assert "whole_word" not in old["megalite.data.objective"]


def test_a_tokenizer_that_does_not_show_words_is_refused(tmp_path: Path) -> None:
    vocabulary = {"[MASK]": 0, **{letter: number for number, letter in enumerate("abc", 1)}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]").save_pretrained(tmp_path)
    keys = {"tokenizer": str(tmp_path), "objective": {"masked": 0.15, "whole_word": True}}
    data = data_section(["x"], LENGTH, valid=[], **keys)
    line = f"objective.whole_word: true: the tokens of {tmp_path} do not show where words begin"
    with pytest.raises(ConfigError, match=re.escape(line)):
        ValidData(data, 10)
