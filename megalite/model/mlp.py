"""The MLP of a block, and the transform before a head. Next: attention.py.

Shapes: B batch, S sequence, T positions seen so far (S without a cache), D hidden, N heads, K key/value heads,
H head size, F intermediate; `/ t` marks a dim that the tensor axis splits.
"""

from torch import Tensor, nn

from megalite.model.activation import activate, gated
from megalite.model.context import Context
from megalite.model.dropout import dropped
from megalite.model.norms import Norm
from megalite.model.spec import Activation, TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.layers import (
    ColumnLinear,
    RowLinear,
    WholeLinear,
    share,
)


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
