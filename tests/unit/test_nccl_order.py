"""Messages of the pipe axis under NCCL's order (tests/nccl_order.py): what the real code calls in training, evaluation
and generation must complete with messages that are too large for NCCL's own buffers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megalite.parallel.pipeline as pipeline
from megalite.inference.generate import Generator
from megalite.inference.sampling import Sampling
from megalite.parallel.grid import Axis, Grid
from tests.nccl_order import Call, Recorder, stuck

BATCH = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


class Engine:
    """What a Pipeline asks of DeepSpeed's engine. synchronize: what DeepSpeed's throughput timer does around each
    micro-batch where it is on (utils/timer.py)."""

    device = torch.device("cpu")

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize = synchronize

    def __call__(self, source: Any, labels: Any, context: Any) -> Any:
        self.synchronize()
        base = source if source.is_floating_point() else torch.zeros(1, requires_grad=True)
        return base.sum() * 1.0 if labels is not None else base * 1.0

    def backward(self, loss: Any, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        self.synchronize()


def pipe_axis(stages: int, rank: int) -> Axis:
    return Axis(stages, rank, tuple(range(stages)), "pipe", back="pipe back")


def calls_of_training(stages: int, micro_batches: int, timer: bool) -> list[list[Call]]:
    """What every rank of a pipe axis asks of torch.distributed in two steps and an evaluation."""
    result = []
    for rank in range(stages):
        recorder = Recorder(rank)
        with patch.object(pipeline, "dist", recorder):
            engine = Engine(recorder.synchronize if timer else lambda: None)
            line = pipeline.Pipeline(engine, pipe_axis(stages, rank), (1,), torch.float32)
            line.train_step([BATCH] * micro_batches, 1.0)
            line.evaluate([BATCH] * micro_batches)
            line.train_step([BATCH] * (micro_batches + 1), 1.0)
        result.append(recorder.calls)
    return result


class _Stage(torch.nn.Module):
    """A stage without layers, of a model with 5 tokens and 4 features."""

    spec: Any = SimpleNamespace(hidden_size=4, vocabulary_size=5, max_positions=None)

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis, self.weight = axis, torch.nn.Parameter(torch.zeros(1))

    def forward(self, source: torch.Tensor, context: Any) -> torch.Tensor:
        return torch.zeros(*source.shape[:2], 5 if self.axis.is_last else 4)


def calls_of_generation(stages: int, batches: int) -> list[list[Call]]:
    """The same of a generation. A rank reads the tokens that it received, which blocks its host."""
    result, receive = [], pipeline.Boundary.receive
    for rank in range(stages):
        recorder = Recorder(rank)

        def received(self: Any, place: int, recorder: Recorder = recorder) -> torch.Tensor:
            tensor = receive(self, place)
            if not tensor.is_floating_point():
                recorder.synchronize()
            return tensor

        with patch.object(pipeline, "dist", recorder), patch.object(pipeline.Boundary, "receive", received):
            axis = pipe_axis(stages, rank)
            generator = Generator(_Stage(axis), Grid(pipe=axis), batch_size=1)  # type: ignore[arg-type]
            generator.generate([[1, 2]] * batches, 3, Sampling())
        result.append(recorder.calls)
    return result


@MODES
@pytest.mark.parametrize("timer", [False, True], ids=["", "timer"])
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_training_and_evaluation_complete(stages: int, timer: bool, lazy: bool) -> None:
    for micro_batches in (1, 2, 3, stages, 2 * stages + 1, 33):
        assert stuck(calls_of_training(stages, micro_batches, timer), lazy) == []


@MODES
@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_generation_completes(stages: int, lazy: bool) -> None:
    for batches in (1, 2, stages, 2 * stages + 1):
        assert stuck(calls_of_generation(stages, batches), lazy) == []


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


def test_one_call_of_both_does_not() -> None:
    ranks = []
    for rank in range(2):
        recorder = Recorder(rank)
        recorder.exchange((1 - rank, torch.zeros(1)), (1 - rank, torch.zeros(1)), group="pipe")
        ranks.append(recorder.calls)
    assert stuck(ranks, lazy=True) == []
