"""Qwen2 (arXiv 2407.10671): Llama with biases on queries, keys and values, and a sliding window in some layers."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import windows
from megalite.model.spec import TransformerSpec

TENSORS = llama.TENSORS
OLD_KEYS = {"head_dim"}  # not a field of the config's class, but read by the attention


def read(config: Any) -> TransformerSpec:
    """A Qwen2Config as our spec."""
    return replace(
        llama.gated(config, attention_bias=True, output_bias=False), windows=windows(config)
    )
