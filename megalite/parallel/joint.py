"""Products of one input with several weights, such as query, key and value: one product where that is cheaper.

DeepSpeed's ZeRO 1 and 2 keep the weights of a parameter group in one buffer, in the model's order, so those of one
layer's linears lie side by side: to a kernel they are one matrix, and nothing is copied. Their gradients to the outputs
are not side by side, and have to be copied for one product with it. The sum that makes the input's gradient is part of
the products in either case. ZeRO-3 gathers each weight for itself, and ZeRO-0 leaves them where they were made.
Next: deferred.py.

T tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def side_by_side(values: Sequence[Tensor]) -> Tensor | None:
    """Tensors that follow one another in memory as one, a view, in their first dim; None where they do not."""
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
    """Whether one product costs less than `count` whose outputs have `out` features together, of inputs of `size`.

    To put the gradients of the outputs side by side reads and writes T · out numbers, and each product but the first
    reads and writes the T · size numbers of the input's gradient again. Half of what that saves goes for outputs that
    are read where they lie, with gaps.
    """
    return count > 1 and 2 * out <= (count - 1) * size


class Joint:
    """weights [out, in] of one type; with matrices, what the products are made with: one, or the weights themselves."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.sizes = [len(weight) for weight in weights]
        wanted = pays(sum(self.sizes), weights[0].shape[1], len(weights))
        whole = side_by_side(weights) if wanted else None
        self.is_one = whole is not None
        self.matrices = list(weights) if whole is None else [whole]

    def outputs(self, x: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
        """x weightᵀ + bias of each; x [..., in]. Of one product they are views of its result."""
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
        """The gradients of the outputs [..., out] as the functions below take them, [T, out] for each matrix."""
        if self.is_one:
            slopes = [torch.cat(list(slopes), dim=-1)]
        return [slope.flatten(0, -2) for slope in slopes]

    def of_input(self, slopes: Sequence[Tensor]) -> Tensor:
        """Gradient of the input [T, in]. The last product first: the order in which autograd would add them up."""
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
