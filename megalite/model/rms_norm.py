"""RMSNorm (arXiv 1910.07467) with a custom backward. Next: layers.py.

y = w · x r with r = (mean x² + eps)^-1/2. Autograd's backward would make ten passes over x and store the inputs of
each. With g the gradient of y, u = g w, and m the mean over the features of a token:

    dx = r (u - x r m(u x r)),    dw = Σ over tokens of g x r

LayerNorm's backward, given 0 as the mean of x, returns dw and dx - r m(u), which torch computes in one fused pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    if x.device.type != "cpu":
        return torchs_rms_norm(x, weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[return-value]


def torchs_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by torch, which has GPU kernels for both directions."""
    return F.rms_norm(x, weight.shape, weight, eps)
