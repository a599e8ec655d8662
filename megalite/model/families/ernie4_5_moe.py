"""ERNIE 4.5 with experts (Baidu, ERNIE 4.5 Technical Report, 2025): Llama with interleaved rotary embeddings, and many
small experts and a shared one in all layers but the first. Its files contain the biases for choosing experts
(router.py)."""

import re
from dataclasses import replace
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families import llama
from megalite.model.families.common import (
    KEY,
    at_least_zero,
    expert_tensors,
    mixture,
    require,
    tensors,
    written,
)
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import Mixture, TransformerSpec

_MLP, _FILE_MLP = "layers.{layer}.mlp", "model.layers.{layer}.mlp"
TENSORS = (
    llama.TENSORS
    | expert_tensors()
    | tensors(
        {
            f"{_MLP}.shared.{ours}": f"{_FILE_MLP}.shared_experts.{ours}_proj"
            for ours in ("gate", "up", "down")
        }
    )
)
_ROUTER_BIAS = f"{_FILE_MLP}.moe_statics.e_score_correction_bias"
_UNUSED = re.compile("mtp")  # layers that predict further tokens, which transformers leaves out too


def read(config: Any) -> TransformerSpec:
    """An Ernie4_5_MoeConfig as our spec."""
    require(config, "use_bias", False, None)
    spec = llama.gated(config, attention_bias=False, output_bias=False)
    assert spec.rotary is not None
    return replace(spec, rotary=replace(spec.rotary, interleaved=True), mixture=_experts(config))


def _experts(config: Any) -> Mixture | None:
    first = config.moe_layer_start_index
    last = config.moe_layer_end_index
    every = config.moe_layer_interval
    layers = range(config.num_hidden_layers)
    routed = [i for i in layers if first <= i <= last and (i + 1) % every == 0]
    experts = mixture(config, config.moe_intermediate_size, normalised=True, layers=routed)
    shared = config.moe_num_shared_experts
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        rule = "must be an integer of at least 0"
        raise ConfigError(f"{KEY}.moe_num_shared_experts: {written(shared)}: {rule}")
    if experts is None:
        return None
    return replace(
        experts,
        least_sum=at_least_zero(config, "moe_norm_min"),
        shared_size=shared * config.moe_intermediate_size,
        shared_is_weighed=False,
    )


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM, router_bias=_ROUTER_BIAS, unused=_UNUSED)
