"""Deferred weight gradients: splits the backward pass into a part for the input and a part for the weights.

Zero-bubble schedules (programs/schedules.py) compute the input's gradient (I) at once, since another rank waits for it,
and the weights' gradients (W) later. Inside `collecting(waiting)`, which is active in forward and in I, no parameter
has an edge in autograd's graph: layers store the operands of their weight gradients in a WeightGradients. `give` then
passes each parameter its gradient through one autograd backward, so that hooks on parameters run as usual, such as
DeepSpeed's, which accumulate, shard and reduce gradients.

torch.distributed.pipelining assigns `weight.grad` directly and bypasses hooks (pytorch/pytorch#144530), so ZeRO does
not work with it. Next: layers.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel.joint import Joint

Make = Callable[[], Tensor]
Finish = Callable[[Tensor], Tensor]


class WeightGradients:
    """The operands of the weight gradients of one chunk and micro-batch, between I and W."""

    def __init__(self) -> None:
        self._makers: list[tuple[nn.Parameter, Make]] = []

    def add(self, weight: nn.Parameter, make: Make) -> None:
        """Records a function that computes a weight's gradient. Called in the order of the backward pass."""
        self._makers.append((weight, make))

    def take(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Computes the gradients in that order and frees their operands. Gradients of the same parameter are summed."""
        makers, self._makers = self._makers[::-1], []
        sums: dict[int, tuple[nn.Parameter, Tensor]] = {}
        while makers:  # the operands of each are freed before the next is computed
            weight, make = makers.pop()
            gradient = make()
            del make
            if id(weight) in sums:
                gradient = sums[id(weight)][1] + gradient
            sums[id(weight)] = weight, gradient.to(weight.dtype)
        return [weight for weight, _ in sums.values()], [gradient for _, gradient in sums.values()]

    def split_off(self, weights: Sequence[Tensor]) -> "WeightGradients":
        """Moves the records of some weights into a new WeightGradients."""
        wanted, other = {id(weight) for weight in weights}, WeightGradients()
        other._makers = [entry for entry in self._makers if id(entry[0]) in wanted]
        self._makers = [entry for entry in self._makers if id(entry[0]) not in wanted]
        return other


# Not a context variable: on some devices autograd runs backward on its own threads.
_now: WeightGradients | None = None


@contextmanager
def collecting(waiting: WeightGradients | None) -> Iterator[None]:
    """Context manager in which layers defer their weight gradients to `waiting`; None: they do not defer."""
    global _now
    before, _now = _now, waiting
    try:
        yield
    finally:
        _now = before


def waiting_now() -> WeightGradients | None:
    """The current WeightGradients that gradients are deferred to; None: they are not deferred."""
    return _now if torch.is_grad_enabled() else None


# The functions below take parameters in a tuple, because autograd does not look inside one. An edge to a parameter
# would run its hooks even if the gradient is None, and ZeRO-2's hook then fails (runtime/zero/stage_1_and_2.py:1457).
# The anchor makes their results require a gradient.
_anchors: dict[torch.device, Tensor] = {}


def anchor(device: torch.device) -> Tensor:
    """A scalar that requires a gradient, so that results computed from it do too."""
    if device not in _anchors:
        _anchors[device] = torch.zeros((), device=device, requires_grad=True)
    return _anchors[device]


class _Later(torch.autograd.Function):
    """Returns the weight detached from autograd's graph; the gradient that arrives for it is deferred."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, weights: tuple[nn.Parameter], waiting: WeightGradients
    ) -> Tensor:
        ctx.weight, ctx.waiting = weights[0], waiting
        return weights[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        gradient = grads[0]
        ctx.waiting.add(ctx.weight, lambda: gradient)
        return None, None, None


class _Products:
    """Gradients of the weights and biases of several linears with a common input. All are computed when the first is
    requested, since they may be one matrix product."""

    def __init__(self, joint: Joint, slopes: list[Tensor], rows: Tensor, biased: bool) -> None:
        self.joint, self.slopes, self.rows, self.biased = joint, slopes, rows, biased
        self.made: dict[tuple[str, int], Tensor] = {}

    def take(self, kind: str, number: int) -> Tensor:
        """kind: "weight" or "bias"."""
        if self.slopes:
            made = {"weight": self.joint.of_weights(self.slopes, self.rows)}
            if self.biased:
                made["bias"] = self.joint.of_biases(self.slopes)
            self.made = {
                (name, i): part for name, some in made.items() for i, part in enumerate(some)
            }
            del self.rows
            self.slopes = []
        return self.made.pop((kind, number))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter | None],
        finishes: Sequence[Finish],
        waiting: WeightGradients,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.weights, ctx.biases, ctx.finishes, ctx.waiting = weights, biases, finishes, waiting
        return tuple(Joint(weights).outputs(x, biases))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A saved input is returned with its grad_fn. Stored in `waiting`, it would keep the graph alive, which in turn
        # refers to `waiting`: a reference cycle.
        x, joint = ctx.saved_tensors[0].detach(), Joint(ctx.weights)
        slopes = joint.slopes(grads)
        biased = any(bias is not None for bias in ctx.biases)
        products = _Products(joint, slopes, x.flatten(0, -2), biased)
        given = joint.of_input(slopes).view(x.shape) if ctx.needs_input_grad[0] else None
        for number, finish in enumerate(ctx.finishes):
            for kind, value in ("weight", ctx.weights[number]), ("bias", ctx.biases[number]):
                if value is not None:
                    ctx.waiting.add(value, _maker(products, kind, number, finish))
        return given, *[None] * 5


def _maker(products: _Products, kind: str, number: int, finish: Finish) -> Make:
    return lambda: finish(products.take(kind, number))


class _DeferredEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: tuple[Any],
        ids: Tensor,
        padding_row: int | None,
        waiting: WeightGradients,
    ) -> Tensor:
        ctx.weight, ctx.ids, ctx.padding_row, ctx.waiting = weights[0], ids, padding_row, waiting
        return F.embedding(ids, weights[0], padding_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        slope, ids, weight = grads[0], ctx.ids, ctx.weight
        padding = -1 if ctx.padding_row is None else ctx.padding_row
        backward = torch.ops.aten.embedding_dense_backward
        ctx.waiting.add(weight, lambda: backward(slope, ids, weight.shape[0], padding, False))
        return None, None, None, None, None


def later(weight: nn.Parameter) -> Tensor:
    """The weight, for operations whose weight gradient is cheap: it is computed along with the input's gradient, but
    reaches the parameter later."""
    waiting = waiting_now()
    return weight if waiting is None else _Later.apply(anchor(weight.device), (weight,), waiting)  # type: ignore[return-value]


def _identity(gradient: Tensor) -> Tensor:
    return gradient


def linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, finish: Finish = _identity
) -> Tensor:
    """x weightᵀ + bias with deferred gradients of weight and bias; x [..., in], weight [out, in]. finish: applied to
    these gradients at the end, such as a sum over ranks."""
    return linears(x, (weight,), (bias,), (finish,))[0]


def linears(
    x: Tensor,
    weights: Sequence[nn.Parameter],
    biases: Sequence[nn.Parameter | None],
    finishes: Sequence[Finish],
) -> list[Tensor]:
    """`linear` for several weights with a common input."""
    return list(_Linears.apply(x, anchor(x.device), weights, biases, finishes, _now))  # type: ignore[arg-type]


def embedding(ids: Tensor, weight: nn.Parameter, padding_row: int | None) -> Tensor:
    """Rows of weight [V, D] for ids [...], as in torch's `embedding`; the weight's gradient may be deferred."""
    waiting = waiting_now()
    if waiting is None:
        return F.embedding(ids, weight, padding_row)
    return _DeferredEmbedding.apply(anchor(ids.device), (weight,), ids, padding_row, waiting)  # type: ignore[return-value]


def is_collecting() -> bool:
    """Whether weight gradients are currently deferred."""
    return waiting_now() is not None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return weights[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients


def give(waiting: WeightGradients) -> Tensor:
    """A scalar (0, fp32) whose backward gives each parameter its gradient, whatever the scalar's own gradient is."""
    weights, gradients = waiting.take()
    return _Give.apply(gradients, *weights)  # type: ignore[return-value]
