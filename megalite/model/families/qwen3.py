"""Qwen3 (arXiv 2505.09388): Llama with a norm of each query and key head, and a configurable head size."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import windows
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

TENSORS = llama.TENSORS | llama.QUERY_AND_KEY_NORMS


def read(config: Any) -> TransformerSpec:
    """A Qwen3Config as our spec."""
    spec = llama.gated(
        config, attention_bias=config.attention_bias, output_bias=config.attention_bias
    )
    return replace(spec, qk_norm="head", windows=windows(config))


FAMILY = Family(read, TENSORS)
