"""Prompts to tokens, and a text that grows (megalite/inference/texts.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from megalite.errors import ConfigError
from megalite.inference.texts import Growing, as_sources, check_ids
from megalite.model.families import read_spec
from tests.small_models import MODELS, VOCABULARY

LLAMA, T5 = (read_spec(MODELS[name]) for name in ("llama", "t5"))


def tokenizer(eod: int | None) -> Any:
    return SimpleNamespace(eod_id=eod)


def test_an_encoder_decoders_prompts_end_as_its_sources_did() -> None:
    prompts = [[5, 6], []]
    assert as_sources(T5, tokenizer(1), prompts) == [[5, 6, 1], [1]]
    assert as_sources(LLAMA, tokenizer(None), prompts) == prompts
    with pytest.raises(ConfigError, match="--tokenizer: has no end-of-sequence token.* t5 model"):
        as_sources(T5, tokenizer(None), prompts)


def test_ids_are_below_the_vocabulary() -> None:
    check_ids(LLAMA, [])
    check_ids(LLAMA, [[], [0, VOCABULARY - 1]])
    line = (
        f"--tokenizer: produces id {VOCABULARY}: must be below the model's vocab_size {VOCABULARY}"
    )
    with pytest.raises(ConfigError, match=line):
        check_ids(LLAMA, [[3], [1, VOCABULARY, 2]])


def test_a_growing_text_shows_whole_characters_once() -> None:
    text = "aé🙂b".encode()
    shown: list[str] = []
    growing = Growing(lambda tokens: bytes(tokens).decode(errors="replace"), shown.append)
    for number, byte in enumerate(text):
        growing.add(number, byte)
    assert shown == ["a", "é", "🙂", "b"]
    growing.end("aé🙂b")
    assert shown[4:] == []
    growing.end("aé🙂b!")  # the text that the cut-off character had held back
    assert shown[4:] == ["!"] and "".join(shown) == "aé🙂b!"
