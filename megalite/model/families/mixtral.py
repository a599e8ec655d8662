"""Mixtral (arXiv 2401.04088): Mistral with experts in place of every MLP; a token's expert weights sum to one."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama, mistral
from megalite.model.families.common import expert_tensors, mixture, require
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

TENSORS = llama.WITHOUT_MLP | expert_tensors("block_sparse_moe", gate="w1", up="w3", down="w2")


def read(config: Any) -> TransformerSpec:
    """A MixtralConfig as our spec."""
    require(config, "router_jitter_noise", 0.0, 0)
    experts = mixture(config, config.intermediate_size, normalised=True)
    return replace(mistral.read(config), mixture=experts)


FAMILY = Family(read, TENSORS)
