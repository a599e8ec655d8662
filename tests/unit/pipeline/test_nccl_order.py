"""Messages of the pipe axis by NCCL's rules of order (tests/nccl_order.py): the calls in training, evaluation and
generation must complete with messages that are too large for NCCL's buffers."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megalite.pipeline.mailbox as mailbox
from megalite.doctor.axis_rates import exchange
from megalite.inference.generate import Generator
from megalite.inference.sampling import Sampling
from megalite.parallel.deferred import WeightGradients
from megalite.parallel.grid import Axis, Grid
from megalite.pipeline.actions import Pipeline
from megalite.pipeline.cut import LayerCosts, ModelCosts
from megalite.pipeline.forwards import Forwards
from megalite.pipeline.pipeline_plan import make_plan
from megalite.programs.schedules import SCHEDULES
from tests.nccl_order import Call, Recorder, stuck

BATCH = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


class Engine:
    """The parts of DeepSpeed's engine that a Pipeline uses. synchronize: called around each micro-batch by DeepSpeed's
    throughput timer, if that is on (utils/timer.py)."""

    device = torch.device("cpu")
    hands_over_by_chunk = False
    current_loss_scale = 1.0
    stage = SimpleNamespace(head_parameters=[], score_shape=())

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.module = synchronize, self

    def __call__(self, source: Any, labels: Any = None, context: Any = None, chunk: int = 0) -> Any:
        self.synchronize()
        if isinstance(source, WeightGradients):
            return torch.zeros((), requires_grad=True) * 1.0
        base = source if source.is_floating_point() else torch.zeros(1, requires_grad=True)
        return base.sum() * 1.0 if labels is not None else base * 1.0

    def backward(self, loss: Any, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def begin_step(self) -> None:
        pass

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def step(self) -> None:
        self.synchronize()


def pipe_axis(stages: int, rank: int, back: str = "pipe back") -> Axis:
    return Axis(stages, rank, tuple(range(stages)), "pipe", back=back)


@cache
def calls_of_training(
    stages: int, micro_batches: int, timer: bool, schedule: str = "1f1b", back: str = "pipe back"
) -> list[list[Call]]:
    """The calls of torch.distributed on every rank of a pipe axis in two steps and an evaluation."""
    costs = ModelCosts((LayerCosts(1.0, 0.1),) * (2 * stages), 1.5)
    counts = (1,) * (2 * stages) if schedule in ("interleaved", "zb-v") else (2,) * stages
    plan = make_plan(schedule, stages, 2, counts, costs)
    result = []
    for rank in range(stages):
        recorder = Recorder(rank)
        with patch.object(mailbox, "dist", recorder):
            engine = Engine(recorder.synchronize if timer else lambda: None)
            line = Pipeline(engine, pipe_axis(stages, rank, back), plan, (1,), torch.float32)
            line.train_step([BATCH] * micro_batches, 1.0)
            line.evaluate(micro_batches + 1, lambda number: BATCH)
            line.train_step([BATCH] * (2 * micro_batches), 1.0)
        result.append(recorder.calls)
    return result


class _Stage(torch.nn.Module):
    """A stage without layers, of a model with 5 tokens and 4 features."""

    spec: Any = SimpleNamespace(
        hidden_size=4, vocabulary_size=5, max_positions=None, start_id=None, stacks=None
    )

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis, self.weight = axis, torch.nn.Parameter(torch.zeros(1))

    def forward(self, source: torch.Tensor, context: Any) -> torch.Tensor:
        return torch.zeros(*source.shape[:2], 5 if self.axis.is_last else 4)


def calls_of_generation(stages: int, batches: int) -> list[list[Call]]:
    """The same for a generation. A rank reads the tokens that it received, which blocks its host."""
    result, take = [], mailbox.Mailbox.take
    for rank in range(stages):
        recorder = Recorder(rank)

        def taken(self: Any, key: Any, recorder: Recorder = recorder) -> torch.Tensor:
            tensor = take(self, key)
            if not tensor.is_floating_point():
                recorder.synchronize()
            return tensor

        with patch.object(mailbox, "dist", recorder), patch.object(mailbox.Mailbox, "take", taken):
            axis = pipe_axis(stages, rank)
            generator = Generator(_Stage(axis), Grid(pipe=axis), batch_size=1)  # type: ignore[arg-type]
            generator.generate([[1, 2]] * batches, 3, Sampling())
        result.append(recorder.calls)
    return result


def calls_of_forwards(stages: int, count: int) -> list[list[Call]]:
    """The same for consecutive forward passes (evaluation and likelihoods in inference)."""
    result = []
    for rank in range(stages):
        recorder = Recorder(rank)
        with patch.object(mailbox, "dist", recorder):
            forwards = Forwards(pipe_axis(stages, rank), torch.float32, torch.device("cpu"))
            forwards.run(range(count), lambda number, hidden: torch.zeros(1), lambda number: (1,))
        result.append(recorder.calls)
    return result


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("timer", [False, True], ids=["", "timer"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_training_and_evaluation_complete(
    stages: int, schedule: str, timer: bool, lazy: bool
) -> None:
    counts = (
        (2, 8)
        if stages == 8
        else (1, 2, 3, stages, 2 * stages + 1, 33 if stages == 2 else stages + 1)
    )
    for micro_batches in counts:
        if schedule != "interleaved" or micro_batches % stages == 0:
            assert stuck(calls_of_training(stages, micro_batches, timer, schedule), lazy) == []


@MODES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_order_of_messages_completes_on_one_group_too(schedule: str, lazy: bool) -> None:
    """Both directions on one communicator: no layout does this, but the order alone must suffice."""
    for stages in (2, 4):
        calls = calls_of_training(stages, 2 * stages, False, schedule, back="pipe")
        assert stuck(calls, lazy) == []


@MODES
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_generation_completes(stages: int, lazy: bool) -> None:
    for batches in (1, 2, stages, 2 * stages + 1):
        assert stuck(calls_of_generation(stages, batches), lazy) == []


@MODES
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_forward_passes_complete_and_wait_for_slow_ranks(stages: int, lazy: bool) -> None:
    calls = calls_of_forwards(stages, 3 * stages)
    assert stuck(calls, lazy) == []
    sends = [call for call in calls[0] if call.messages]
    waits = [call for call in calls[0] if call.waits_for is not None]
    assert len(waits) == len(sends) and waits[0] is calls[0][2], "a wait before the third send"


def test_two_that_send_to_each_other_first_on_one_group_hang() -> None:
    ranks = []
    for rank in range(2):
        recorder = Recorder(rank)
        work = recorder.isend(torch.zeros(1), 1 - rank, group="pipe")
        recorder.recv(torch.zeros(1), 1 - rank, group="pipe")
        work.wait()
        ranks.append(recorder.calls)
    assert stuck(ranks, lazy=True) == ["rank 0: call 0: send to 1", "rank 1: call 0: send to 0"]
    assert stuck(ranks, lazy=True, buffered=1) == []


def test_two_that_send_to_each_other_in_one_call_do_not_hang() -> None:
    ranks = []
    for rank in range(2):
        recorder = Recorder(rank)
        recorder.exchange((1 - rank, torch.zeros(1)), (1 - rank, torch.zeros(1)), group="pipe")
        ranks.append(recorder.calls)
    assert stuck(ranks, lazy=True) == []


@MODES
@pytest.mark.parametrize("stages", [2, 3, 8])
def test_the_doctors_messages_complete(stages: int, lazy: bool) -> None:
    """Several exchanges in a row."""
    ranks = []
    for rank in range(stages):
        recorder = Recorder(rank)
        ends = {"isend": recorder.isend, "irecv": recorder.irecv}
        with patch.multiple(torch.distributed, **ends):
            for _ in range(3):
                exchange(pipe_axis(stages, rank), torch.zeros(1))
        ranks.append(recorder.calls)
    assert stuck(ranks, lazy) == []
