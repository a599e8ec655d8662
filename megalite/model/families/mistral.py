"""Mistral (arXiv 2310.06825): Llama with a sliding window in every layer."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import require
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec


def read(config: Any) -> TransformerSpec:
    """A MistralConfig as our spec."""
    # transformers' Mistral does not read layer_types: a config that has it is a Ministral's.
    require(config, "layer_types", None)
    spec = llama.gated(config, attention_bias=False, output_bias=False)
    if config.sliding_window is None:
        return spec
    return replace(spec, windows=(config.sliding_window,) * spec.num_layers)


FAMILY = Family(read, llama.TENSORS)
