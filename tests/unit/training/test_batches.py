"""Micro-batches that are read while a step runs (megalite/training/batches.py)."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megalite.data.position import Position
from megalite.training.batches import Prefetcher


class Reading:
    """Reads a word for each position; records the positions and the threads of its calls."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, position: Position) -> list[Any]:
        self.asked.append(position.step)
        self.threads.add(threading.current_thread().name)
        if position.step == 13:
            raise OSError("the disk is gone")
        return [f"{position.step}/{position.consumed_samples}/{position.left_out}"]


@pytest.fixture
def reading() -> Reading:
    return Reading()


@pytest.fixture
def ahead(reading: Reading) -> Iterator[Prefetcher]:
    made = Prefetcher(reading, torch.device("cpu"))
    yield made
    made.close()


def at(step: int, **fields: Any) -> Position:
    return Position(step, 8 * step, **fields)


def test_the_next_step_is_read_once_in_another_thread(ahead: Prefetcher, reading: Reading) -> None:
    for step in range(3):
        assert ahead.take(at(step), at(step + 1)) == [f"{step}/{8 * step}/()"]
    assert ahead.take(at(3), None) == ["3/24/()"]
    assert reading.asked == [0, 1, 2, 3] and reading.threads == {"batches_0"}
    assert ahead.coming is None


def test_what_was_read_for_another_position_is_not_used(
    ahead: Prefetcher, reading: Reading
) -> None:
    """After a rewind, or if samples were left out, the same step has other samples."""
    ahead.take(at(5), at(6))
    assert ahead.take(at(2), at(3)) == ["2/16/()"]
    changed = at(3, left_out=((24, 32),))
    assert ahead.take(changed, None) == ["3/24/((24, 32),)"]
    ahead.take(at(7), at(8))
    assert ahead.take(Position(8, 3), None) == ["8/3/()"]


def test_an_error_comes_with_its_own_step(ahead: Prefetcher) -> None:
    assert ahead.take(at(12), at(13)) == ["12/96/()"]
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.take(at(13), None)
    assert ahead.take(at(14), None) == ["14/112/()"]
