"""Qwen2 (arXiv 2407.10671): Llama with biases on queries, keys and values, and a sliding window in some layers."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import windows
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec


def read(config: Any) -> TransformerSpec:
    """A Qwen2Config as our spec."""
    return replace(
        llama.gated(config, attention_bias=True, output_bias=False), windows=windows(config)
    )


FAMILY = Family(read, llama.TENSORS, old_keys=HEAD_DIM)
