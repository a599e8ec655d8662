"""Parameters that record how they are split, and the layers built from them: column, row and vocabulary layers, which
the tensor axis splits, and a linear layer that is whole on every rank.

`parameter.placement`, a `Placement`, is the single record of how a parameter is split: its full name, its full shape,
and for each axis that cuts it the dim and range. Initial values, the gradient norm, checkpoints, other layouts and
Hugging Face files all read it. A layer's modules are created with local names; `name_parameters` sets the full names.
Next: loss.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel import deferred
from megalite.parallel.collectives import Split, enter, sum_over
from megalite.parallel.deferred import later
from megalite.parallel.grid import Axis


class AxisCut(NamedTuple):
    """One axis's cut of a tensor: this rank holds [start, stop) of `dim`, one of `parts` ranges."""

    axis: str
    dim: int
    start: int
    stop: int
    parts: int


@dataclass
class Placement:
    """The slice of the full tensor that a parameter on this rank is.

    full_shape: shape of the unsplit tensor; cuts: one for each axis that splits it, on different dims, empty if it is
    whole; std: standard deviation of its initial values, None if they are all `fill` (1 or 0); counted: whether this
    rank's copy is the one that counts in sums over the model plane (the gradient norm) and that checkpoints store;
    name: full name, the same on every layout; replicas: the group (topology/axes.py) whose ranks hold copies of the
    slice, over which ZeRO shards it; drawn_apart: whether each index of the first dim (an expert) is drawn separately,
    so that a rank need not draw the others.
    """

    full_shape: tuple[int, ...]
    cuts: tuple[AxisCut, ...]
    std: float | None
    fill: float
    counted: bool
    name: str = ""
    replicas: str = "replica"
    drawn_apart: bool = False

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of the slice in each dim of the full tensor."""
        starts = {cut.dim: cut.start for cut in self.cuts}
        return tuple(starts.get(dim, 0) for dim in range(len(self.full_shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        sizes = {cut.dim: cut.stop - cut.start for cut in self.cuts}
        return tuple(sizes.get(dim, size) for dim, size in enumerate(self.full_shape))

    @property
    def uneven(self) -> bool:
        """Whether ranks have slices of different sizes."""
        return any(self.full_shape[cut.dim] % cut.parts for cut in self.cuts)

    def cut(self, full: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
        """This rank's slice (a view) of the full tensor. skip: dims that are not cut."""
        for _, dim, start, stop, _ in self.cuts:
            if dim not in skip:
                full = full.narrow(dim, start, stop - start)
        return full

    @property
    def has_own_replicas(self) -> bool:
        """Whether fewer ranks than usual hold copies of the slice: it is an expert's, and there is an expert axis."""
        return any(cut.axis == "expert" and cut.parts > 1 for cut in self.cuts)


@dataclass
class Shard:
    """A rank's shard of one parameter's master weights and moments: a flat range of its slice.

    placement: the position of the slice in the full tensor; start: first element of the range in the slice; master [n]
    fp32 and state: views of the optimizer's memory, so that writing to them changes the optimizer's values.
    """

    placement: Placement
    start: int
    master: Tensor
    state: dict[str, Tensor]


def share(length: int, axis: Axis, unit: int = 1) -> tuple[int, int]:
    """The half-open range of `length` that this rank of the axis holds, cut only at multiples of `unit` (a head).

    Ranges differ by at most one unit, so that nothing needs padding (an odd vocabulary, for example). If there are
    fewer units than ranks, each rank holds one unit, and neighbouring ranks (`holders`) hold the same one.
    """
    units = length // unit
    start, stop = axis.rank * units // axis.size, (axis.rank + 1) * units // axis.size
    return start * unit, max(stop, start + 1) * unit


def holders(length: int, axis: Axis, unit: int) -> Axis:
    """The run of the axis whose ranks hold the same `share`: this rank alone if there are enough units."""
    return axis.run(max(1, axis.size // (length // unit)))


def parameter(
    shape: tuple[int, ...],
    dim: int | None,
    axis: Axis,
    std: float | None,
    fill: float = 0.0,
    unit: int = 1,
) -> nn.Parameter:
    """An uninitialised parameter for this rank's slice of `shape`; `initialise` gives it values."""
    cuts, copies = (), axis
    if dim is not None:
        cuts = (AxisCut("tensor", dim, *share(shape[dim], axis, unit), axis.size),)
        copies = holders(shape[dim], axis, unit)
    return _empty(Placement(shape, cuts, std, fill, counted=copies.is_first))


def _empty(placement: Placement) -> nn.Parameter:
    result = nn.Parameter(torch.empty(placement.shape))
    result.placement = placement  # type: ignore[attr-defined]
    return result


def expert_parameter(
    shape: tuple[int, int, int], dim: int, tensor: Axis, expert: Axis, std: float
) -> nn.Parameter:
    """An uninitialised parameter for the weights of all experts, `shape` [E, out, in]: the expert axis splits the first
    dim, the tensor axis `dim`."""
    cuts = (
        AxisCut("expert", 0, *share(shape[0], expert), expert.size),
        AxisCut("tensor", dim, *share(shape[dim], tensor), tensor.size),
    )
    return _empty(
        Placement(shape, cuts, std, 0.0, counted=True, replicas="expert_replica", drawn_apart=True)
    )


def placed(module: nn.Module) -> Iterator[tuple[nn.Parameter, Placement]]:
    """Each parameter of the module once, with its placement, in the module's order."""
    for value in module.parameters():
        yield value, value.placement  # type: ignore[misc]


def name_parameters(module: nn.Module, prefix: str) -> None:
    """Sets the full name of every parameter of a layer: prefix + its name in the layer."""
    for name, value in module.named_parameters():
        value.placement.name = f"{prefix}.{name}"  # type: ignore[union-attr]


def initialise(module: nn.Module, seed: int) -> None:
    """Fills in initial values as a function of (seed, full name), so that every layout starts from the same model; for
    experts as a function of (seed, full name, expert)."""
    for value, placement in placed(module):
        with torch.no_grad():
            if placement.std is None:
                value.fill_(placement.fill)
            else:
                value.copy_(initial_slice(placement, seed))


def initial_slice(placement: Placement, seed: int) -> Tensor:
    """Initial values of a rank's slice of a parameter whose `std` is not None, in fp32 on the CPU.

    The full tensor is drawn and the slice is cut from it, so the result does not depend on the split. Peak memory is
    the slice plus one full tensor, or one expert's full matrix.
    """
    assert placement.std is not None
    if not placement.drawn_apart:
        full = drawn(f"{seed}/{placement.name}", placement.full_shape, placement.std)
        return placement.cut(full)
    result = torch.empty(placement.shape, dtype=torch.float32, device="cpu")
    for index, part in enumerate(result, start=placement.offsets[0]):
        full = drawn(f"{seed}/{placement.name}/{index}", placement.full_shape[1:], placement.std)
        part.copy_(placement.cut(full.unsqueeze(0), skip=(0,))[0])
    return result


def drawn(key: str, shape: tuple[int, ...], std: float) -> Tensor:
    """Normally distributed numbers as a function of the key, fp32 on the CPU."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    full = torch.empty(shape, dtype=torch.float32, device="cpu")
    return full.normal_(0.0, std, generator=generator)


def materialise(value: nn.Parameter, content: Tensor) -> None:
    """Gives a parameter on the meta device its content, in place: all references to it remain valid."""
    other = nn.Parameter(content)
    vars(other).update(vars(value))
    torch.utils.swap_tensors(value, other)


def zero_buffers(stage: nn.Module, device: torch.device) -> None:
    """Allocates buffers: a router's tally and bias, which start at 0."""
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


class ColumnLinear(nn.Module):
    """y = x Wᵀ + b with W's rows (the output features) split: each rank computes its own features.

    x [..., in_size] is the same on every rank; the caller passes it through `enter` once for all layers that read it.
    y [..., out_size / t]. `unit` features stay together (a head). If there are fewer units than ranks, ranks hold
    copies; each computes a part of the gradient, and the parts are summed over the holders.
    """

    def __init__(
        self, in_size: int, out_size: int, bias: bool, axis: Axis, std: float, unit: int = 1
    ) -> None:
        super().__init__()
        self.holders = holders(out_size, axis, unit)
        self.weight = parameter((out_size, in_size), 0, axis, std, unit=unit)
        self.bias = parameter((out_size,), 0, axis, None, unit=unit) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if deferred.is_collecting():
            return deferred.linear(x, self.weight, self.bias, self.sum_over_holders)
        bias = None if self.bias is None else enter(self.bias, self.holders)
        return F.linear(x, enter(self.weight, self.holders), bias)

    def sum_over_holders(self, gradient: Tensor) -> Tensor:
        """Sums the gradient of weight or bias over the holders, in place."""
        return sum_over(gradient.contiguous(), self.holders)


class RowLinear(nn.Module):
    """y = x Wᵀ + b with W's columns (the input features) split: partial products are summed over the axis.

    x [B, S, in_size / t], the rank's own features; y [B, S or S / t, out_size]. The bias is whole and added once,
    after the sum. is_summed: False leaves the sum to the caller; then there must be no bias, and x and y may have any
    leading dims.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool,
        split: Split,
        std: float,
        is_summed: bool = True,
    ) -> None:
        super().__init__()
        self.split, self.is_summed = split, is_summed
        self.weight = parameter((out_size, in_size), 1, split.axis, std)
        self.bias = parameter((out_size,), None, split.axis, None) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product = deferred.linear if deferred.is_collecting() else F.linear
        y = product(x, self.weight, None)
        y = self.split.leave(y) if self.is_summed else y
        return y if self.bias is None else y + enter(later(self.bias), self.split.users)


class WholeLinear(nn.Module):
    """y = x Wᵀ + b between split products, with W whole on every rank. x [B, S or S / t, in_size]."""

    def __init__(self, in_size: int, out_size: int, bias: bool, split: Split, std: float) -> None:
        super().__init__()
        self.users = split.users
        self.weight = parameter((out_size, in_size), None, split.axis, std)
        self.bias = parameter((out_size,), None, split.axis, None) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if deferred.is_collecting():
            return deferred.linear(x, self.weight, self.bias, self._sum_over_users)
        bias = None if self.bias is None else enter(self.bias, self.users)
        return F.linear(x, enter(self.weight, self.users), bias)

    def _sum_over_users(self, gradient: Tensor) -> Tensor:
        return sum_over(gradient.contiguous(), self.users)


class VocabularyEmbedding(nn.Module):
    """An embedding table [V, D] whose rows are split over the axis: each rank looks up the ids that it holds, and the
    results are summed over the axis.

    ids [B, S] int64 in [0, V); result [B, S or S / t, D]. V need not be divisible. `padding_id` gets no gradient, as in
    torch's Embedding.
    """

    def __init__(
        self,
        vocabulary_size: int,
        hidden_size: int,
        split: Split,
        std: float,
        padding_id: int | None,
    ) -> None:
        super().__init__()
        self.split = split
        self.start, self.stop = share(vocabulary_size, split.axis)
        self.weight = parameter((vocabulary_size, hidden_size), 0, split.axis, std)
        here = padding_id is not None and self.start <= padding_id < self.stop
        self.padding_row = padding_id - self.start if here and padding_id is not None else None

    def forward(self, ids: Tensor) -> Tensor:
        if self.split.axis.size == 1:
            return deferred.embedding(ids, self.weight, self.padding_row)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        rows = deferred.embedding(
            (ids - self.start).masked_fill(elsewhere, 0), self.weight, self.padding_row
        )
        return self.split.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))
