"""A step and an evaluation around a pipeline that computes nothing (megalite/training/step.py, evaluation.py)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.model.context import Context
from megalite.parallel.grid import ALONE, Axis, Grid
from megalite.training import evaluation, step
from megalite.training.batches import MicroBatch
from megalite.training.evaluation import loss_and_tokens
from megalite.training.step import samples_that_count, tokens_that_count, train_step

LABELS = [[[1, -100, 2], [-100, -100, -100]], [[-100, 3, -100], [4, 5, 6]]]
"""Of two micro-batches of two samples: 6 labels count, in 3 samples."""


def micro_batches() -> list[MicroBatch]:
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    return [MicroBatch(zeros, torch.tensor(labels), Context()) for labels in LABELS]


class Pipeline:
    """Records its calls."""

    def __init__(self, grid: Grid, mixture: Any = None) -> None:
        self.moved = 0
        router = SimpleNamespace(tally=torch.ones(3))
        stage = SimpleNamespace(
            spec=SimpleNamespace(mixture=mixture), routers={0: router}, head="a head"
        )
        self.engine = SimpleNamespace(
            grid=grid, stage=stage, current_loss_scale=4.0, device="cpu",
            global_norm=SimpleNamespace(accepted=True),
            router_bias=SimpleNamespace(move=self._move),
            modes=[], eval=lambda: self.engine.modes.append("eval"),
            train=lambda: self.engine.modes.append("train"),
        )  # fmt: skip
        self.loss = torch.tensor(30.0)

    def _move(self) -> None:
        self.moved += 1

    def train_step(self, batches: list[MicroBatch], scale: Tensor, ready: Any) -> Tensor:
        self.scale, self.batches = scale, batches
        if ready is not None:
            ready()
        return self.loss

    def evaluate(self, count: int, read: Callable[[int], MicroBatch]) -> Tensor:
        assert [read(number).labels.tolist() for number in range(count)] == LABELS
        return self.loss


def test_tokens_and_samples_that_count() -> None:
    assert tokens_that_count(micro_batches()).item() == 6
    assert samples_that_count(micro_batches(), ALONE).tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_the_loss_is_a_mean_over_the_tokens_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with the same number of tokens; DeepSpeed divides by the ranks."""
    replica, told = Axis(3, 0, (0, 1, 2), None), list[Tensor]()
    monkeypatch.setattr(step, "sum_over", lambda counts, axis: counts * axis.size)
    pipeline: Any = Pipeline(Grid())
    loss, tokens = train_step(pipeline, replica, micro_batches(), told.append)
    assert loss.item() == 30.0 and tokens.item() == 18
    assert pipeline.scale.item() == pytest.approx(3 / 18) and pipeline.scale.dtype == torch.float32
    assert [part.item() for part in told] == [30.0 / 18] and told[0].dtype == torch.float64
    assert pipeline.moved == 0


def test_a_batch_without_counted_tokens_is_divided_by_one() -> None:
    pipeline: Any = Pipeline(Grid())
    batches = micro_batches()
    for batch in batches:
        batch.labels.fill_(-100)
    _, tokens = train_step(pipeline, ALONE, batches)
    assert tokens.item() == 1 and pipeline.scale.item() == 1.0


def test_routers_losses_are_means_over_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample that counts has the same weight, which compensates for DeepSpeed's division and the loss scale."""
    monkeypatch.setattr(step, "sum_over", lambda counts, axis: counts * axis.size)
    pipeline: Any = Pipeline(Grid(), mixture="experts")
    train_step(pipeline, Axis(2, 0, (0, 1), None), micro_batches())
    each = [batch.context.balance.tolist() for batch in pipeline.batches]
    factor = 4.0 * 2 / (2 * 3)  # loss scale × ranks / samples of all ranks
    assert each == [pytest.approx([factor, 0.0]), pytest.approx([factor, factor])]
    assert not pipeline.engine.stage.routers[0].tally.any() and pipeline.moved == 1
    pipeline.engine.global_norm.accepted = False
    train_step(pipeline, ALONE, micro_batches())
    assert pipeline.moved == 1, "an update that is left out moves no bias"


@pytest.mark.parametrize(
    ("tensor_rank", "head", "wanted"),
    [(0, "a head", [30.0, 6.0]), (1, "a head", [0.0, 0.0]), (0, None, [0.0, 0.0])],
)
def test_an_evaluation_counts_each_loss_once(
    tensor_rank: int, head: Any, wanted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda result: None)
    pipeline: Any = Pipeline(Grid(tensor=Axis(2, tensor_rank, (0, 1), None)))
    pipeline.engine.stage.head = head
    found = loss_and_tokens(pipeline, micro_batches())
    assert found.tolist() == wanted and found.dtype == torch.float64
    assert pipeline.engine.modes == ["eval", "train"]


def test_a_classifiers_counts_come_after_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda result: None)
    pipeline: Any = Pipeline(Grid())
    pipeline.loss = torch.tensor([30.0, 1.0, 2.0, 3.0, 0.0])
    assert loss_and_tokens(pipeline, micro_batches()).tolist() == [30.0, 6.0, 1.0, 2.0, 3.0, 0.0]
