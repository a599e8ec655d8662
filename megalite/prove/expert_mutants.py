"""Faults of a model with experts, on any axes. Next: mutants.py, which lists them.

Among them are a norm that omits experts (NVIDIA/Megatron-LM#5916), gradients of experts that are divided by the number
of their copies instead of by all data ranks (pytorch/pytorch#160285), and a balance loss per micro-batch.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megalite.config import Config
from megalite.engine.norm import GlobalNorm
from megalite.model import experts as experts_over
from megalite.model import shared_expert as shared_over
from megalite.model.experts import Experts
from megalite.model.router import Router
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.prove.planting import put
from megalite.prove.trace import Plant, Session

NEAR = 0.02  # probabilities this close count as equal


def of_experts(config: Config, spec: TransformerSpec, grid: Grid) -> Iterable[tuple[str, Plant]]:
    """The faults that apply to a layout's resolved config, by name; none if the model has no experts."""
    if spec.mixture is None:
        return
    yield "experts: left out of the norm", _norm_without_experts
    yield "experts: a token's last choice is silently dropped", _dropped_tokens
    if grid.data.size * grid.pipe.size * grid.tensor.size > 1:
        yield "experts: the last rank resolves near ties differently", _other_ties
    if grid.expert.size > 1:
        yield "experts: gradients are divided by the copies of an expert", _wrong_divisor
        yield "experts: rows come back in the order of their arrival", _unsorted
    if spec.mixture.weighs_shared and grid.tensor.size > 1:
        yield "experts: the shared expert's gate gradient is not summed", _unsummed
    router = config.train.router
    balanced = router is None or router.balance == "sample"
    if balanced and spec.mixture.balance_coefficient > 0 and config.micro_batch_size > 1:
        yield "experts: the balance loss is computed over a micro-batch", _balance_of_micro_batches


class _WithoutExperts(GlobalNorm):
    def __call__(self, pieces: Any, device: torch.device, replicated: bool) -> Tensor:
        rest = (piece for piece in pieces if ".experts." not in piece[0].name)
        return super().__call__(rest, device, replicated)


def _norm_without_experts(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    norm: Any = session.engine.global_norm
    norm.__class__ = _WithoutExperts


def _wrong_divisor(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    ratio = session.engine.grid.expert.size
    for value, placement in placed(session.engine.stage):
        if placement.has_own_replicas:
            value.register_hook(lambda gradient: gradient * ratio)


def _dropped_tokens(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Drops the first token's last choice in each micro-batch, as an expert at capacity would."""
    if event != "built":
        return
    whole = Experts.forward

    def dropping(self: Experts, rows: Tensor, chosen: Tensor) -> Tensor:
        kept = torch.ones(*chosen.shape, 1, dtype=rows.dtype, device=rows.device)
        kept[0, -1] = 0
        return whole(self, rows, chosen) * kept

    put(stack, Experts, "forward", dropping)


def _other_ties(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Chooses the wrong one of two nearly equally likely experts."""
    grid = session.engine.grid
    last = grid.data.is_last and grid.pipe.is_last and grid.tensor.is_last
    if event != "built" or not last:
        return
    whole = Router.choose

    def otherwise(self: Router, probabilities: Tensor) -> Tensor:
        ranked = probabilities.argsort(dim=-1, descending=True, stable=True)
        chosen, k = whole(self, probabilities).clone(), self.mixture.chosen
        if k < self.mixture.count:
            last_two = probabilities.gather(1, ranked[:, k - 1 : k + 1])
            near = last_two[:, 0] - last_two[:, 1] < NEAR
            chosen[near, -1] = ranked[near, k]
        return chosen

    put(stack, Router, "choose", otherwise)


def _unsorted(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event != "built":
        return
    whole = experts_over.exchange

    def turned(rows: Tensor, route: Any) -> Tensor:
        return whole(rows, route).roll(1, 0)

    put(stack, experts_over, "exchange", turned)


def _unsummed(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event == "built":
        put(stack, shared_over, "enter", lambda weight, axis: weight)


def _balance_of_micro_batches(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event != "built":
        return
    whole = Router._losses

    def pooled(
        self: Router, logits: Tensor, probabilities: Tensor, counts: Tensor
    ) -> Tensor | None:
        mean = counts.mean(dim=0, keepdim=True).expand_as(counts)
        return whole(self, logits, probabilities, mean)

    put(stack, Router, "_losses", pooled)
