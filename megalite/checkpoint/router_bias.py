"""The biases by which routers choose experts, in a checkpoint's state, and given to a stage. What moves them:
engine/router_bias.py."""

from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.errors import CheckpointError
from megalite.model.spec import Mixture
from megalite.model.transformer import Stage


def bias_of(state: dict[str, Any], mixture: Mixture) -> Tensor | None:
    """The biases of a checkpoint's state, fp32 [layers, E]; None where it has none. CheckpointError where they are not
    those of such a model."""
    if ROUTER_BIAS not in state:
        return None
    shape = len(mixture.layers), mixture.count
    try:
        values = torch.tensor(state[ROUTER_BIAS], dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for null and objects
        values = torch.empty(0)
    if tuple(values.shape) != shape or not values.isfinite().all():
        rule = f"must be {shape[0]} lists of {shape[1]} finite numbers"
        raise CheckpointError(f"{ROUTER_BIAS} of the checkpoint's state: {rule}")
    return values


def set_router_bias(stage: Stage, state: dict[str, Any], device: torch.device) -> None:
    """Gives a stage the biases of a checkpoint's state, where there are any. After a change of the stage's type: they
    stay fp32."""
    mixture = stage.spec.mixture
    values = None if mixture is None else bias_of(state, mixture)
    if mixture is not None and values is not None:
        for layer, router in stage.routers.items():
            router.bias = values[mixture.layers.index(layer)].to(device)
