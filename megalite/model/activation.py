"""Activations, and the gate of an MLP (SwiGLU, arXiv 2002.05202). Next: mlp.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.compiled import compiled, compiles
from megalite.model.spec import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Applies the activation elementwise."""
    match activation:
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activate(gate) · up, elementwise. If compiled, it is one kernel forward and one backward, which recomputes
    activate(gate) instead of storing it."""
    if compiles():
        return _Gated.apply(gate, up, activation)  # type: ignore[return-value]
    return _product(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return compiled(_product)(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        of_gate, of_up = compiled(_slopes)(grads[0], *ctx.saved_tensors, ctx.activation)
        return of_gate, of_up, None


def _product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return activate(gate, activation) * up


def _slopes(
    slope: Tensor, gate: Tensor, up: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from the gradient of the product."""
    of_activation, aten = slope * up, torch.ops.aten
    match activation:
        case "silu":
            of_gate = aten.silu_backward(of_activation, gate)
        case "relu":
            of_gate = aten.threshold_backward(of_activation, gate, 0)
        case _:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            of_gate = aten.gelu_backward(of_activation, gate, approximate=approximate)
    return of_gate, slope * activate(gate, activation)
