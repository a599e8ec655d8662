"""A checkpoint's copy from a device: made in a separate stream after the update; the next update and the writer wait
for it. Tested on a CPU with a stream that copies as late as the waits allow: if a wait were missing, the files would
have other values."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.checkpoint import save
from megalite.engine.engine import Engine
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, train

STEPS = 4  # each is saved
PATIENCE = 60.0  # seconds for which the writer lets the next update wait for the copies


class LateStream(TorchDispatchMode):
    """Queues the copies requested inside it. They are made when something waits for the event after them."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.told, self.copies, self.events = told, list[Any](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.append(args[:2])
            return args[0]
        return func(*args, **(kwargs or {}))

    def wait_stream(self, other: Any) -> None:
        self.told.append(f"copies wait for {other}")

    def record_event(self) -> Any:
        self.events += 1
        copies, self.copies = self.copies, []
        assert copies
        self.told.append("copies")
        return LateEvent(self.told, copies, self.events == STEPS)


class LateEvent:
    """last: whether no update follows."""

    def __init__(self, told: list[str], copies: list[Any], last: bool) -> None:
        self.told, self.copies, self.last = told, copies, last
        self.made = threading.Event()

    def wait(self) -> None:
        self.told.append("update waits")
        self._make()

    def synchronize(self) -> None:
        if self.last or not self.made.wait(PATIENCE):
            self._make()

    def _make(self) -> None:
        for place, values in self.copies:
            place.copy_(values)
        self.copies.clear()
        self.made.set()


@contextlib.contextmanager
def late(told: list[str], too_late: bool) -> Iterator[None]:
    """Makes copies with late streams. too_late: plants the fault that an update waits for them after it, not before."""
    update = Engine._take_model_step

    def counted(self: Engine, *args: Any) -> None:
        waited = self.update_waits_for
        if too_late:
            self.update_waits_for = None
        update(self, *args)
        told.append("update")
        if too_late and waited is not None:
            waited.wait()

    with (
        mock.patch.object(save, "stream_beside", lambda device: LateStream(told)),
        mock.patch.object(torch.accelerator, "current_stream", lambda: "the step"),
        mock.patch.object(Engine, "_take_model_step", counted),
    ):
        yield


def runs(rank: int, world_size: int, plain: Any, copied: Any, faulty: Any) -> list[str]:
    told: list[str] = []
    cases = [
        (plain, nothing),
        (copied, lambda rank: late(told, too_late=False)),
        (faulty, lambda rank: late([], too_late=True)),
    ]
    assert train(rank, world_size, cases) == [0, 0, 0]
    return told


def tensors(run: Path) -> dict[str, bytes]:
    files = (run / "checkpoints").glob("step_*/tensors_*")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_copies_hold_the_numbers_of_their_step(tmp_path: Path, zero: int) -> None:
    keys = {"steps": STEPS, "checkpoint_interval": 1, "keep_checkpoints": 0}
    names = ("plain", "copied", "faulty")
    documents = [document(tmp_path, name, {"zero": zero}, train=keys) for name in names]
    of_step = ["copies wait for the step", "copies", "update waits", "update"]
    for told in run_ranks(2, runs, *documents):
        assert told == ["update", *of_step * (STEPS - 1), *of_step[:2]]
    plain, copied, faulty = (tensors(tmp_path / name) for name in names)
    assert len(plain) == 2 * STEPS and copied == plain
    assert faulty.keys() == plain.keys() and faulty != plain
