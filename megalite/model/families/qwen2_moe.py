"""Qwen2 with experts (Qwen1.5-MoE; arXiv 2407.10671, section 2.2.2): Qwen2 with many small experts and a shared one in
place of the MLP of most or all layers."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import (
    expert_tensors,
    mixture,
    routed_layers,
    tensors,
    windows,
)
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

_MLP, _FILE_MLP = "layers.{layer}.mlp", "model.layers.{layer}.mlp"
TENSORS = (
    llama.TENSORS
    | expert_tensors()
    | tensors(
        {
            f"{_MLP}.shared.gate": f"{_FILE_MLP}.shared_expert.gate_proj",
            f"{_MLP}.shared.up": f"{_FILE_MLP}.shared_expert.up_proj",
            f"{_MLP}.shared.down": f"{_FILE_MLP}.shared_expert.down_proj",
            f"{_MLP}.shared.weigher": f"{_FILE_MLP}.shared_expert_gate",
        }
    )
)


def read(config: Any) -> TransformerSpec:
    """A Qwen2MoeConfig as our spec."""
    experts = mixture(
        config, config.moe_intermediate_size, config.norm_topk_prob, routed_layers(config)
    )
    if experts is not None:
        experts = replace(experts, shared_size=config.shared_expert_intermediate_size)
    spec = llama.gated(config, attention_bias=config.qkv_bias, output_bias=False)
    return replace(spec, windows=windows(config), mixture=experts)


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM)
