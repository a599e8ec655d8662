"""Products of one input with several weights, such as query, key and value, as a single product if that is cheaper.

DeepSpeed's ZeRO 1 and 2 store the weights of a parameter group in one buffer, in the model's order, so the weights of a
layer's linears are adjacent in memory: a kernel can use them as one matrix without a copy. The gradients of the outputs
are not adjacent and must be copied for a single product. In both cases the products also sum up the input's gradient.
ZeRO-3 gathers each weight separately, and ZeRO-0 leaves them where they were allocated. Next: deferred.py.

T tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def side_by_side(values: Sequence[Tensor]) -> Tensor | None:
    """A view of tensors that are adjacent in memory, concatenated along dim 0; None if they are not adjacent."""
    first = values[0]
    storage, at = first.untyped_storage().data_ptr(), first.storage_offset()
    if not storage:  # on the meta device
        return None
    for value in values:
        here = value.untyped_storage().data_ptr() == storage and value.storage_offset() == at
        if not here or not value.is_contiguous():
            return None
        at += value.numel()
    shape = sum(map(len, values)), *first.shape[1:]
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def pays(out: int, size: int, count: int) -> bool:
    """Whether one product costs less than `count` products. out: their total output features; size: input features.

    Concatenating the output gradients reads and writes T · out numbers, while each product after the first reads and
    writes the T · size numbers of the input's gradient again. Half of that saving is reserved for later operations,
    which read the outputs as strided views.
    """
    return count > 1 and 2 * out <= (count - 1) * size


class Joint:
    """Weights [out, in] of one dtype, and the matrices that the products use: a single one, or the weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.sizes = [len(weight) for weight in weights]
        wanted = pays(sum(self.sizes), weights[0].shape[1], len(weights))
        whole = side_by_side(weights) if wanted else None
        self.is_one = whole is not None
        self.matrices = list(weights) if whole is None else [whole]

    def outputs(self, x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """x weightᵀ + bias for each weight; x [..., in]. With a single product they are views of its result."""
        if not self.is_one:
            return [F.linear(x, *both) for both in zip(self.matrices, biases, strict=True)]
        given = [bias for bias in biases if bias is not None]
        assert len(given) in (0, len(biases))
        whole = None
        if given:
            whole = side_by_side(given)
            whole = torch.cat(given) if whole is None else whole
        return list(F.linear(x, self.matrices[0], whole).split(self.sizes, dim=-1))

    def slopes(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """The output gradients [..., out] in the form that the functions below take, [T, out] for each matrix."""
        if self.is_one:
            slopes = [torch.cat(list(slopes), dim=-1)]
        return [slope.flatten(0, -2) for slope in slopes]

    def of_input(self, slopes: Sequence[Tensor]) -> Tensor:
        """Gradient of the input [T, in]. The last product comes first, the order in which autograd would sum them."""
        (slope, matrix), *others = reversed([*zip(slopes, self.matrices, strict=True)])
        result = slope @ matrix
        for slope, matrix in others:
            result.addmm_(slope, matrix)
        return result

    def of_weights(self, slopes: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Gradient of each weight [out, in]; rows [T, in]: the input."""
        made = [slope.t() @ rows for slope in slopes]
        return list(made[0].split(self.sizes)) if self.is_one else made

    def of_biases(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of each bias [out]."""
        made = [slope.sum(0) for slope in slopes]
        return list(made[0].split(self.sizes)) if self.is_one else made
