"""OLMoE (arXiv 2409.02060): Llama with a norm of all queries and of all keys, and experts in every layer."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import (
    equal_head_size,
    expert_tensors,
    mixture,
    require,
    tensors,
)
from megalite.model.spec import TransformerSpec

TENSORS = (
    llama.WITHOUT_MLP
    | tensors(
        {
            "layers.{layer}.attention.query_norm": "model.layers.{layer}.self_attn.q_norm",
            "layers.{layer}.attention.key_norm": "model.layers.{layer}.self_attn.k_norm",
        }
    )
    | expert_tensors(
        "mlp.gate",
        gate="mlp.experts.{expert}.gate_proj",
        up="mlp.experts.{expert}.up_proj",
        down="mlp.experts.{expert}.down_proj",
    )
)
OLD_KEYS = {"head_dim"}  # no field of the config's class, and read by the attention


def read(config: Any) -> TransformerSpec:
    """An OlmoeConfig as our spec."""
    require(config, "clip_qkv", None)
    equal_head_size(config)  # transformers' norms of queries and keys have no other
    bias = config.attention_bias
    spec = llama.gated(config, attention_bias=bias, output_bias=bias)
    experts = mixture(config, config.intermediate_size, config.norm_topk_prob)
    return replace(spec, qk_norm="projection", mixture=experts)
