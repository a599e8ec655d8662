"""The bubble of each schedule, measured on real ranks whose work is sleep: it shows what messages and the interpreter
add to the simulated clock. A busy machine lengthens it, so this is a long form."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.deferred import WeightGradients
from megalite.parallel.grid import Grid
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.cut import LayerCosts, ModelCosts
from megalite.pipeline.pipeline_plan import PipelinePlan, make_plan
from megalite.programs.check import check
from megalite.programs.schedules import SCHEDULES
from tests.ranks import run_ranks

UNIT_SECONDS, STEPS, WITHIN = 0.2, 3, 0.01


class _Sleeps(torch.autograd.Function):
    """An autograd function that sleeps in backward."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, sleeper: "Sleeper", seconds: float) -> Tensor:
        ctx.sleeper, ctx.seconds = sleeper, seconds
        return source.view_as(source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.sleeper.sleep(ctx.seconds)
        return grads[0], None, None


class Sleeper:
    """An engine whose forward, backward to the input and weight gradients take one unit each, divided among the chunks
    of a rank."""

    device, hands_over_by_chunk, current_loss_scale = "cpu", False, 1.0
    head_parameters: list[Any] = []

    def __init__(self, plan: PipelinePlan) -> None:
        self.seconds = UNIT_SECONDS * plan.pipe / len(plan.cut.home)
        self.halves = plan.schedule.startswith("zb")
        self.module = self.stage = self
        self.kind: Callable[[], str] = str
        """Of the action that the rank does now."""
        self.slept = 0.0
        """Seconds of work: sleeping takes somewhat longer than what it is asked for."""

    def sleep(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.slept += time.perf_counter() - start

    def __call__(
        self, source: Any, labels: Any = None, context: Any = None, chunk: int = 0
    ) -> Tensor:
        if isinstance(source, WeightGradients):
            if self.kind() == "W":  # otherwise it is the head's part of I
                self.sleep(self.seconds)
            return torch.zeros((), requires_grad=True) * 1.0
        self.sleep(self.seconds)
        base = source if source.is_floating_point() else torch.zeros(4, requires_grad=True)
        output: Any = _Sleeps.apply(base, self, self.seconds * (1 if self.halves else 2))
        return output.sum() if labels is not None else output

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def begin_step(self) -> None:
        pass

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def step(self) -> None:
        pass


def measure(rank: int, world_size: int, micro_batches: int) -> dict[str, tuple[float, float]]:
    """(seconds, those of this rank's work) of the shortest step of each schedule."""
    axis = Grid.build(world_size, 1).pipe
    batches = [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    ] * micro_batches
    found = {}
    for schedule in SCHEDULES:
        chunks = SCHEDULES[schedule].chunks or 2
        costs = ModelCosts((LayerCosts(1.0, 0.0),) * (world_size * chunks), 0.0)
        plan = make_plan(schedule, world_size, chunks, (1,) * (world_size * chunks), costs)
        sleeper: Any = Sleeper(plan)
        pipeline = Pipeline(sleeper, axis, plan, (4,), torch.float32)
        sleeper.kind = lambda pipeline=pipeline: pipeline.interpreter.action.kind  # type: ignore[union-attr]
        seconds = []
        for _ in range(STEPS):
            dist.barrier()
            start, sleeper.slept = time.monotonic(), 0.0
            pipeline.train_step(batches, 1.0)
            dist.barrier()
            seconds.append((time.monotonic() - start, sleeper.slept))
        found[schedule] = min(seconds)
    return found


@pytest.mark.long
@pytest.mark.parametrize("p, m", [(2, 8), (4, 8), (8, 16)])
def test_measured_bubbles_are_the_simulated_ones(p: int, m: int) -> None:
    ranks = run_ranks(p, measure, m, timeout_seconds=300)
    bubbles: dict[str, float] = {}
    wrong: list[str] = []
    for schedule in SCHEDULES:
        step, work = max(found[schedule] for found in ranks)
        assert work == pytest.approx(3 * m * UNIT_SECONDS, rel=0.01)
        bubbles[schedule] = 1 - work / step
        chunks = SCHEDULES[schedule].chunks or 2
        costs = ModelCosts((LayerCosts(1.0, 0.0),) * (p * chunks), 0.0)
        plan = make_plan(schedule, p, chunks, (1,) * (p * chunks), costs)
        simulated = check(plan.program(m), plan.cost).bubble
        line = f"p {p}, m {m}, {schedule}: measured {100 * bubbles[schedule]:.1f} %, simulated {100 * simulated:.1f} %"
        print(line)
        if schedule != "zb-v" and bubbles[schedule] > simulated + WITHIN:
            wrong.append(line)
    assert not wrong, "; ".join(wrong)
    assert bubbles["zb-v"] < bubbles["zb-h1"] < bubbles["interleaved"] < bubbles["1f1b"]
