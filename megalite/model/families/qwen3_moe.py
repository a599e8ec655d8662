"""Qwen3 with experts (arXiv 2505.09388): many small experts in place of the MLP of most or all layers."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama, qwen3
from megalite.model.families.common import expert_tensors, mixture, routed_layers
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

TENSORS = qwen3.TENSORS | expert_tensors()


def read(config: Any) -> TransformerSpec:
    """A Qwen3MoeConfig as our spec."""
    bias, window = config.attention_bias, config.sliding_window
    spec = llama.gated(config, attention_bias=bias, output_bias=bias)
    windows = () if window is None else (window,) * spec.num_layers
    experts = mixture(
        config, config.moe_intermediate_size, config.norm_topk_prob, routed_layers(config)
    )
    return replace(spec, qk_norm="head", windows=windows, mixture=experts)


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM)
