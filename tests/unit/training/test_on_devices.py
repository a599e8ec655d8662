"""Micro-batches on their way to a device: everything in them is page-locked and copied without blocking."""

import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.data.position import Position
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.rows import Rows
from megalite.training.batches import LazyMicroBatches, MicroBatch, Prefetcher, on_device, pinned

DEVICE = torch.device("meta")  # takes any tensor from main memory
CONTEXT = Axis(2, 0, (0, 1), None)


class Samples:
    """Packed documents with prefixes; few labels count."""

    def batch(self, positions: Any) -> Any:
        documents = np.repeat(np.arange(4), 2)[None].repeat(len(positions), 0)
        labels = np.where(np.arange(8) == 3, 5, -100)[None].repeat(len(positions), 0)
        return np.zeros_like(labels), labels, documents, np.arange(8)[None] % 2 < documents


def micro_batch(rows: Rows | None) -> MicroBatch:
    cpu = torch.device("cpu")
    (made,) = LazyMicroBatches(Samples(), 0, 2, 2, ALONE, cpu, draw=(1, 0), rows=rows).read()
    return made


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, whatever field they are in."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


@pytest.mark.parametrize("rows", [None, Rows(CONTEXT, 8)], ids=["whole", "context"])
def test_everything_is_pinned_and_copied_without_blocking(rows: Rows | None) -> None:
    batch, locked, copied = micro_batch(rows), list[int](), list[Any]()
    to = Tensor.to

    def lock(self: Tensor) -> Tensor:
        locked.append(id(self))
        return self

    def copy(self: Tensor, *args: Any, **keys: Any) -> Tensor:
        copied.append((args, keys))
        return to(self, *args, **keys)

    with patch.object(Tensor, "pin_memory", lock), patch.object(Tensor, "to", copy):
        moved = on_device(pinned(batch, DEVICE), DEVICE)
    expected = [*tensors(batch)]
    assert len(expected) == (8 if rows is None else 13)
    assert sorted(locked) == sorted(map(id, expected))
    assert copied == [((DEVICE,), {"non_blocking": True})] * len(expected)
    assert [x.shape for x in tensors(moved)] == [x.shape for x in expected]
    assert all(x.device == DEVICE for x in tensors(moved))


def test_on_a_cpu_nothing_is_copied() -> None:
    batch, cpu = micro_batch(None), torch.device("cpu")
    assert on_device(pinned(batch, cpu), cpu) is batch


def test_the_thread_that_reads_ahead_pins() -> None:
    threads = set[str]()

    def lock(self: Tensor) -> Tensor:
        threads.add(threading.current_thread().name)
        return self

    with (
        patch.object(Tensor, "pin_memory", lock),
        patch.object(torch.accelerator, "set_device_index", lambda index: None),
    ):
        prefetcher = Prefetcher(lambda position: [micro_batch(None)], DEVICE)
        (taken,) = prefetcher.take(Position(), None)
        prefetcher.close()
    assert threads == {"batches_0"} and taken.tokens.device == DEVICE
