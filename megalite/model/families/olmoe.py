"""OLMoE (arXiv 2409.02060): Llama with a norm of all queries and of all keys, and experts in every layer."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import equal_head_size, expert_tensors, mixture, require
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

TENSORS = llama.WITHOUT_MLP | llama.QUERY_AND_KEY_NORMS | expert_tensors()


def read(config: Any) -> TransformerSpec:
    """An OlmoeConfig as our spec."""
    require(config, "clip_qkv", None)
    equal_head_size(config)  # transformers' norms of queries and keys support no other size
    bias = config.attention_bias
    spec = llama.gated(config, attention_bias=bias, output_bias=bias)
    experts = mixture(config, config.intermediate_size, config.norm_topk_prob)
    return replace(spec, qk_norm="projection", mixture=experts)


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM)
