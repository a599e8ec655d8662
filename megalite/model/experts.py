"""A mixture of experts in place of the MLP: each token goes through the k gated MLPs that its router chooses (arXiv
2401.04088, section 2.1). Experts have no capacity limit, and no token is dropped. Next: attention.py.

Rows are sorted by expert, in a stable order, and go through grouped products. With an expert axis each of its ranks
holds E / e experts: rows are sent to the ranks of their experts and back (parallel/exchange.py). The tensor axis
divides each expert's features as it does an MLP's. A shared expert (shared_expert.py) is added if the model has one.

T tokens, E experts, k of them chosen, e ranks of the expert axis, F features of an expert; n rows for this rank's
experts, T·k without an expert axis.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from megalite.model.activation import gated
from megalite.model.context import Context
from megalite.model.router import Router
from megalite.model.shared_expert import SharedExpert
from megalite.model.spec import Activation, Mixture, TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.exchange import Route, exchange, exchange_evenly
from megalite.parallel.grid import Axis
from megalite.parallel.grouped import RowGroups, grouped_linear
from megalite.parallel.layers import expert_parameter


class RoutedMLP(nn.Module):
    """x [B, S or S / t, D] -> the same shape: the sum of the chosen experts' outputs, weighted by the router, plus the
    shared expert's."""

    def __init__(
        self,
        spec: TransformerSpec,
        mixture: Mixture,
        split: Split,
        expert_axis: Axis,
        context_axis: Axis,
    ) -> None:
        super().__init__()
        self.split = split
        self.router = Router(spec, mixture, split, context_axis)
        self.experts = Experts(spec, mixture, split.axis, expert_axis)
        self.shared = SharedExpert(spec, mixture, split) if mixture.shared_size else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.split.enter(x)
        rows = x.flatten(0, 1)
        chosen, weights = self.router(rows, context)
        mixed = self.experts(rows, chosen)  # [T, k, D]; partial sums over this rank's features
        mixed = (mixed * weights.to(mixed.dtype).unsqueeze(-1)).sum(dim=1)
        if self.shared is not None:
            mixed = mixed + self.shared(rows)
        return self.split.leave(mixed.view_as(x))


class Experts(nn.Module):
    """Rows [T, D] and their experts [T, k] -> outputs [T, k, D]."""

    def __init__(
        self, spec: TransformerSpec, mixture: Mixture, tensor_axis: Axis, axis: Axis
    ) -> None:
        super().__init__()
        self.axis, self.count = axis, mixture.count
        self.activation: Activation = spec.activation
        e, d, f, std = mixture.count, spec.hidden_size, mixture.intermediate_size, spec.init_std
        self.gate = GroupedLinear((e, f, d), 1, tensor_axis, axis, std)
        self.up = GroupedLinear((e, f, d), 1, tensor_axis, axis, std)
        self.down = GroupedLinear((e, d, f), 2, tensor_axis, axis, spec.scaled_by_depth(std))

    def forward(self, rows: Tensor, chosen: Tensor) -> Tensor:
        k, ids = chosen.shape[1], chosen.flatten()
        order = ids.argsort(stable=True)  # by expert, then by token
        rows = _Repeat.apply(rows, order, k)  # type: ignore[assignment]
        groups = RowGroups.of(ids[order], self.count)
        alone = self.axis.size == 1
        made = self._products(rows, groups) if alone else self._on_all_ranks(rows, groups.ends)
        return _Permute.apply(made, inverse(order)).unflatten(0, (-1, k))  # type: ignore[union-attr]

    def _products(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Rows [n, D], sorted by this rank's experts -> [n, D]."""
        hidden = gated(self.gate(rows, groups), self.up(rows, groups), self.activation)
        return self.down(hidden, groups)

    def _on_all_ranks(self, rows: Tensor, ends: Tensor) -> Tensor:
        """The outputs of experts that are spread over the ranks of the axis."""
        e, here = self.axis.size, self.count // self.axis.size
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        arriving = exchange_evenly(counts, self.axis)  # by source, then by this rank's experts
        # The only synchronization with the host: sizes of the messages and of this rank's groups.
        sizes = torch.cat([counts.view(e, here).sum(1), arriving]).tolist()
        given, arrived = sizes[:e], sizes[e:]
        by_source = [arrived[first : first + here] for first in range(0, self.count, here)]
        route = Route(self.axis, tuple(given), tuple(map(sum, by_source)))
        stops = [*accumulate(map(sum, zip(*by_source, strict=True)))]
        # Rows arrive sorted by source and expert; sort them by expert and source.
        own = torch.arange(here, device=rows.device).repeat(e)
        own = own.repeat_interleave(arriving, output_size=sum(route.taken))
        order = own.argsort(stable=True)
        rows = _Permute.apply(exchange(rows, route), order)  # type: ignore[assignment]
        made = self._products(rows, RowGroups(RowGroups.of(own[order], here).ends, stops))
        made = _Permute.apply(made, inverse(order))
        return exchange(made, route.back)  # type: ignore[arg-type]


class GroupedLinear(nn.Module):
    """Multiplies rows [n, in], sorted by expert, by this rank's part of weight [E, out, in] -> [n, out]. dim: the dim
    that the tensor axis splits."""

    def __init__(
        self, shape: tuple[int, int, int], dim: int, tensor_axis: Axis, axis: Axis, std: float
    ) -> None:
        super().__init__()
        self.weight = expert_parameter(shape, dim, tensor_axis, axis, std)

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        return grouped_linear(rows, self.weight, groups)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation."""
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device)
    return result


class _Permute(torch.autograd.Function):
    """rows[order] for a permutation; its backward is a permutation too, unlike autograd's sum in no fixed order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0][inverse(order)], None


class _Repeat(torch.autograd.Function):
    """Repeats each of rows [T, D] k times, permuted by `order` [T·k]; the k gradients are summed in order of choice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return rows[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][inverse(order)].unflatten(0, (-1, ctx.k)).sum(dim=1), None, None
