"""The biases for choosing experts: reads them from a checkpoint's state and sets them in a stage. engine/router_bias.py
updates them in training."""

from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.errors import CheckpointError
from megalite.model.spec import Mixture
from megalite.model.transformer import Stage


def bias_of(state: dict[str, Any], mixture: Mixture) -> Tensor | None:
    """The biases in a checkpoint's state, fp32 [layers, E]; None if there are none. Raises CheckpointError if they do
    not fit the model."""
    if ROUTER_BIAS not in state:
        return None
    shape = len(mixture.layers), mixture.count
    try:
        values = torch.tensor(state[ROUTER_BIAS], dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for null and objects
        values = torch.empty(0)
    if tuple(values.shape) != shape or not values.isfinite().all():
        rule = f"must be {shape[0]} lists of {shape[1]} finite numbers"
        raise CheckpointError(f"{ROUTER_BIAS} in the checkpoint's state: {rule}")
    return values


def set_router_bias(stage: Stage, state: dict[str, Any], device: torch.device) -> None:
    """Sets the biases of a stage from a checkpoint's state, if there are any. Call it after changing the stage's dtype,
    because they must stay fp32."""
    mixture = stage.spec.mixture
    values = None if mixture is None else bias_of(state, mixture)
    if mixture is not None and values is not None:
        for layer, router in stage.routers.items():
            router.bias = values[mixture.layers.index(layer)].to(device)
