"""Sparse upcycling (arXiv 2212.05055): converts a dense model to one with experts. Every expert starts as a copy of the
layer's MLP, and the router is initialised randomly. The weights of the chosen experts sum to one, so the model computes
the same function as the dense one until it is trained.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalite.errors import ConfigError
from megalite.hub.hf_folder import HFFolder, full_shapes
from megalite.model.families import read_spec
from megalite.parallel.layers import drawn

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Families of dense models, and the families with experts that they are converted to."""
EXPERTS, ROUTER = ".mlp.experts.", ".mlp.router."


@dataclass(frozen=True)
class UpcyclingOptions:
    """count: experts per layer; chosen: experts per token; seed: of the routers."""

    count: int
    chosen: int
    seed: int = 1234


class Upcycled:
    """A Hugging Face folder with experts in place of MLPs, with the same model, names and read. Raises ConfigError if
    its family has no counterpart with experts."""

    def __init__(self, dense: HFFolder, experts: UpcyclingOptions) -> None:
        self.dense, self.experts, self.folder = dense, experts, dense.folder
        self.model = _with_experts(dense.model, experts)
        self.spec = read_spec(self.model)
        self.shapes = full_shapes(self.spec)

    @property
    def names(self) -> list[str]:
        """Full names of our parameters."""
        return list(self.shapes)

    def read(self, name: str) -> Tensor:
        """A parameter."""
        shape = self.shapes[name]
        if EXPERTS in name:
            return self.dense.read(name.replace(EXPERTS, ".mlp.")).expand(shape).contiguous()
        if ROUTER in name:
            return drawn(f"{self.experts.seed}/{name}", shape, self.spec.init_std)
        return self.dense.read(name)


def _with_experts(model: dict[str, Any], experts: UpcyclingOptions) -> dict[str, Any]:
    """The config of the model with experts."""
    dense = model["model_type"]
    if dense not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"--experts: a {dense} model has no counterpart with experts: must be one of {known}"
        )
    family = FAMILIES[dense]
    made = {**model, "model_type": family, "num_experts_per_tok": experts.chosen}
    made.pop("layer_types", None)
    if family == "mixtral":
        for key in ("attention_bias", "mlp_bias"):
            if made.pop(key, False):
                raise ConfigError(f"--experts: {key}: True: a mixtral model has no such biases")
        made.pop("pretraining_tp", None)
        return made | {"num_local_experts": experts.count}
    if made.pop("use_sliding_window", False):
        raise ConfigError(
            "--experts: use_sliding_window: True: must be false: windows differ by layer"
        )
    for key in ("sliding_window", "max_window_layers"):
        made.pop(key, None)
    made |= {"moe_intermediate_size": made["intermediate_size"], "norm_topk_prob": True}
    return made | {"num_experts": experts.count}
