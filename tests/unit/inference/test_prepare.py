"""The checks of generation and evaluation before ranks start (megalite/inference/prepare.py)."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.errors import ConfigError, UserError
from megalite.hub.sources import open_weights
from megalite.inference.beams import Beams
from megalite.inference.prepare import (
    beams_asked,
    check_decoder,
    model_parser,
    prepare_model,
    stop_ids_for,
    tokenizer_for,
)
from megalite.model.families import read_spec
from tests.byte_model import save_byte_model
from tests.families import FAMILY_CONFIGS, hf_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("prepare") / "hf")


def options(folder: Path, *words: str) -> argparse.Namespace:
    return model_parser("a program").parse_args(["--checkpoint", str(folder), *words])


def test_axes_and_other_sections_are_taken_apart(folder: Path) -> None:
    asked = options(folder, "megalite.parallel.tensor=2", "megalite.data.order=corpus")
    made = prepare_model(asked, 4, sections=("data",))
    assert (made.parallel.tensor, made.parallel.pipe) == (2, 1)
    assert made.sections == {"data": {"order": "corpus"}} and not made.prefixed
    assert made.folder == folder and made.spec == read_spec(made.model)


@pytest.mark.parametrize(
    ("words", "world_size", "line"),
    [
        (["optimizer.type=Adam"], 1, "optimizer: unknown key"),
        (["megalite.train.seed=1"], 1, "megalite.train: unknown key"),
        (["megalite.parallel.schedule=1f1b"], 1, "schedule: 1f1b: is for training; must be left"),
        (["megalite.parallel.expert=2"], 2, "megalite.parallel.expert: 2: is for training; must be left"),
        (["megalite.parallel.context=2"], 2, "context: 2: is for training and evaluate.py --data;"),
        (["megalite.parallel.tensor=2"], 3, "world size: 3: must be a multiple"),
        (["megalite.parallel.tensor=0"], 1, "megalite.parallel.tensor: 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder: Path, words: list[str], world_size: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        prepare_model(options(folder, *words), world_size)


def test_whole_samples_may_be_divided_by_the_context_axis(folder: Path) -> None:
    asked = options(folder, "megalite.parallel.context=2")
    assert prepare_model(asked, 2, whole_samples=True).parallel.context == 2


def test_what_needs_a_decoder_says_so() -> None:
    specs = {name: read_spec(FAMILY_CONFIGS[name]) for name in ("llama", "bert", "t5")}
    check_decoder(specs["llama"], "x", "generation")
    check_decoder(specs["t5"], "x", "generation", sources=True)
    for name, line in (
        ("bert", "^x: a bert model is an encoder: chat needs a decoder, such as llama$"),
        ("t5", "^x: a t5 model is an encoder-decoder: chat needs a decoder, such as llama$"),
    ):
        with pytest.raises(ConfigError, match=line):
            check_decoder(specs[name], "x", "chat")
    classifier: Any = SimpleNamespace(stacks=None, classifier="two labels", causal=True)
    with pytest.raises(
        ConfigError, match="^x: is a classifier of texts: chat needs a language model"
    ):
        check_decoder(classifier, "x", "chat")


def test_the_tokenizer_goes_with_the_weights_or_is_named(folder: Path, tmp_path: Path) -> None:
    prepared = prepare_model(options(folder), 1)
    own = tokenizer_for(options(folder), prepared)
    assert own.eod_id is not None
    hf_model(FAMILY_CONFIGS["gpt2"]).save_pretrained(tmp_path)
    without = prepare_model(options(tmp_path), 1)
    with pytest.raises(ConfigError, match=f"^--tokenizer: missing: {tmp_path} does not say which"):
        tokenizer_for(options(tmp_path), without)
    named = tokenizer_for(options(tmp_path, "--tokenizer", str(folder)), without)
    assert named.eod_id == own.eod_id


def test_beams_and_their_penalty() -> None:
    def asked(beams: int | None, penalty: float | None) -> Any:
        return beams_asked(argparse.Namespace(beams=beams, length_penalty=penalty))

    assert asked(None, None) is None
    assert asked(4, None) == Beams(4, 1.0) and asked(4, 0.0) == Beams(4, 0.0)
    with pytest.raises(ConfigError, match="^--length-penalty: 2.0: only with --beams$"):
        asked(None, 2.0)


def test_a_text_ends_by_the_tokenizers_end_and_the_models(folder: Path, tmp_path: Path) -> None:
    made = save_byte_model(tmp_path / "hf")
    (made / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    prepared = prepare_model(options(made), 1)
    weights, eod = open_weights(prepared.folder), SimpleNamespace(eod_id=2)
    assert stop_ids_for(weights, eod) == {2, 7, 9}  # type: ignore[arg-type]
    assert stop_ids_for(weights, SimpleNamespace(eod_id=None)) == {7, 9}  # type: ignore[arg-type]
