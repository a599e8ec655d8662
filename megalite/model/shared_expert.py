"""The shared expert: a gated MLP that every token goes through in addition to its chosen experts (arXiv 2401.06066,
section 3.2); in Qwen2 (arXiv 2407.10671, section 2.2.2) its output is weighted by a sigmoid of the token. Next:
router.py.

The tensor axis divides its features as it does an MLP's; the expert axis does not divide it. T tokens.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.activation import gated
from megalite.model.spec import Activation, Mixture, TransformerSpec
from megalite.parallel.collectives import Split, enter
from megalite.parallel.deferred import later
from megalite.parallel.grid import Axis
from megalite.parallel.layers import ColumnLinear, RowLinear, parameter


class SharedExpert(nn.Module):
    """Rows [T, D], after the caller's `enter` -> [T, D]: partial sums over this rank's features. The caller adds them
    to those of the other experts and then sums over the tensor axis."""

    def __init__(self, spec: TransformerSpec, mixture: Mixture, split: Split) -> None:
        super().__init__()
        self.activation: Activation = spec.activation
        d, f, std, axis = spec.hidden_size, mixture.shared_size, spec.init_std, split.axis
        self.gate = ColumnLinear(d, f, False, axis, std)
        self.up = ColumnLinear(d, f, False, axis, std)
        self.down = RowLinear(f, d, False, split, spec.scaled_by_depth(std), is_summed=False)
        self.weigher = Weigher(d, axis, std) if mixture.shared_is_weighed else None

    def forward(self, rows: Tensor) -> Tensor:
        made = self.down(gated(self.gate(rows), self.up(rows), self.activation))
        return made if self.weigher is None else made * self.weigher(rows)


class Weigher(nn.Module):
    """Rows [T, D] -> the weight [T, 1] of the shared expert for each; the parameter is whole on every tensor rank."""

    def __init__(self, hidden_size: int, axis: Axis, std: float) -> None:
        super().__init__()
        self.axis = axis
        self.weight = parameter((1, hidden_size), None, axis, std)

    def forward(self, rows: Tensor) -> Tensor:
        # Each rank of the tensor axis computes a part of the gradient, from its features of the expert.
        return F.linear(rows, enter(later(self.weight), self.axis)).sigmoid()
