"""The parts of a block other than attention (norms, the MLP), and the transform before a head. Next: attention.py.

Shapes: B batch, S sequence, T positions seen so far (S without a cache), D hidden, N heads, K key/value heads,
H head size, F intermediate; `/ t` marks a dim that the tensor axis splits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.activation import activate, gated
from megalite.model.context import Context
from megalite.model.dropout import dropped
from megalite.model.rms_norm import rms_norm
from megalite.model.spec import Activation, TransformerSpec
from megalite.parallel.collectives import Split, enter, leave
from megalite.parallel.columns import columns
from megalite.parallel.deferred import later
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import (
    ColumnLinear,
    RowLinear,
    WholeLinear,
    holders,
    parameter,
    share,
)


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


class MLP(nn.Module):
    """D -> F -> D with the F features split; gated (SwiGLU, arXiv 2002.05202) or plain."""

    def __init__(self, spec: TransformerSpec, layer: int, split: Split) -> None:
        super().__init__()
        self.split, axis = split, split.axis
        self.activation: Activation = spec.activation
        d, f, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        std, out_std = spec.std_of(d), spec.scaled_by_depth(spec.std_of(f))
        self.gate = ColumnLinear(d, f, bias, axis, std) if spec.gated else None
        self.up = ColumnLinear(d, f, bias, axis, std)
        self.down = RowLinear(f, d, bias, split, out_std)
        self.dropout, self.place = spec.mlp_dropout, f"layers.{layer}.mlp.features"
        self.features = range(*share(f, axis))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.gate is None:
            (up,) = columns(x, (self.up,), self.split)
            return self.down(self._drop(activate(up, self.activation), context))
        gate, up = columns(x, (self.gate, self.up), self.split)
        return self.down(self._drop(gated(gate, up, self.activation), context))

    def _drop(self, features: Tensor, context: Context) -> Tensor:
        """Dropout of this rank's features, of all tokens."""
        if context.randomness is None or self.dropout == 0.0:
            return features
        rows = context.row_numbers(range(features.shape[1]), features.device)
        mask = dropped(context.randomness, self.place, self.dropout, [rows, self.features])
        return features.masked_fill(mask, 0.0) / (1 - self.dropout)


class Transform(nn.Module):
    """Dense layer, activation and norm between the layers and the head of an encoder, [..., D] -> [..., D]."""

    def __init__(self, spec: TransformerSpec, split: Split) -> None:
        super().__init__()
        assert spec.head_transform is not None
        self.activation: Activation = spec.head_transform
        d, std = spec.hidden_size, spec.scaled_by_depth(spec.init_std)
        self.dense = WholeLinear(d, d, spec.head_transform_bias, split, std)
        self.norm = Norm(spec, split.axis, d, split.users)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(activate(self.dense(hidden), self.activation))
