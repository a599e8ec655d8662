"""The norms: RMSNorm (arXiv 1910.07467), with a custom backward, and LayerNorm. Next: mlp.py.

y = w · x r with r = (mean x² + eps)^-1/2. Autograd's backward would make ten passes over x and store the inputs of
each. With g the gradient of y, u = g w, and m the mean over the features of a token:

    dx = r (u - x r m(u x r)),    dw = Σ over tokens of g x r

LayerNorm's backward, given 0 as the mean of x, returns dw and dx - r m(u), which torch computes in one fused pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import enter, leave
from megalite.parallel.deferred import later
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import holders, parameter


class _RmsNorm(torch.autograd.Function):
    """Computes in fp32 as in transformers; x [..., size], weight [size]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide, size = x.float(), x.shape[-1]
        root = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            .square_()
            .div_(size)
            .add_(eps)
            .rsqrt_()
        )
        ctx.save_for_backward(x, weight, root)
        normed = wide * root if wide is x else wide.mul_(root).to(x.dtype)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        slope, scale, size = grads[0].float(), weight.float(), x.shape[-1]
        wanted = [*ctx.needs_input_grad[:2], False]
        layer_norm = torch.ops.aten.native_layer_norm_backward
        dx, dw, _ = layer_norm(
            slope, x.float(), (size,), torch.zeros_like(root), root, scale, None, wanted
        )
        if dx is not None:
            mean = torch.mv(slope.reshape(-1, size), scale).view(root.shape).div_(size)
            dx = dx.addcmul_(root, mean).to(x.dtype)
        return dx, None if dw is None else dw.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] divided by its root mean square, times weight [size]; in the dtype of x."""
    if x.device.type != "cpu":  # GPUs have kernels for both directions
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[return-value]


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, computed in fp32 as in transformers.

    x [..., size]. users: the ranks that apply the same weight to different parts of the work; their parts of its
    gradient are summed.
    """

    def __init__(self, spec: TransformerSpec, axis: Axis, size: int, users: Axis = ALONE) -> None:
        super().__init__()
        self.eps, self.users, self.centred = spec.norm_eps, users, spec.norm == "layer"
        self.weight = parameter((size,), None, axis, None, fill=1.0)
        self.bias = (
            parameter((size,), None, axis, None) if self.centred and spec.norm_bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = enter(later(self.weight), self.users)
        if self.centred:
            bias = None if self.bias is None else enter(later(self.bias), self.users)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return rms_norm(x, weight, self.eps)


class SplitNorm(nn.Module):
    """RMSNorm over features that the tensor axis splits by heads: the mean square is over all features.

    x [..., share of size]. If several ranks hold copies of a head (`holders`), each counts for a part of it.
    """

    def __init__(self, spec: TransformerSpec, axis: Axis, size: int) -> None:
        super().__init__()
        self.eps, self.axis, self.size = spec.norm_eps, axis, size
        self.holders = holders(size, axis, spec.head_size)
        self.weight = parameter((size,), 0, axis, None, fill=1.0, unit=spec.head_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return rms_norm(x, later(self.weight), self.eps)
        wide = x.float()
        squares = wide.pow(2).sum(dim=-1, keepdim=True) / self.holders.size
        # Each rank uses the sum for its own features, so its gradients are summed like the squares.
        squares = enter(leave(squares, self.axis), self.axis)
        wide = wide * torch.rsqrt(squares / self.size + self.eps)
        return enter(later(self.weight), self.holders) * wide.to(x.dtype)
