"""Memory limit for the copy of a checkpoint (megalite/checkpoint/save.py)."""

import contextlib
from typing import Any

import pytest
import torch

from megalite.checkpoint import save
from megalite.checkpoint.boxes import Box
from megalite.checkpoint.save import Copy, own_device

MIB = 2**20


class Stream(contextlib.nullcontext[None]):
    """A device's stream, which completes everything at once."""

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> None: ...


def test_the_limit_counts_what_page_locked_memory_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from a GPU may take twice its bytes; if only its bytes were counted, a node would run out of memory."""
    values = torch.arange(9 * MIB // 4, dtype=torch.float32)
    boxes = {"weight/x": [Box((len(values),), (0,), values)]}
    plain = Copy(10 * MIB)
    assert plain.take(boxes) is not None and plain.held_bytes == 9 * MIB

    empty, fill, told = torch.empty, torch.Tensor.copy_, list[tuple[str, Any]]()

    def allocated(*args: Any, pin_memory: bool, **keys: Any) -> torch.Tensor:
        told.append(("pinned", pin_memory))
        return empty(*args, **keys)

    def copied(self: torch.Tensor, source: torch.Tensor, **keys: Any) -> torch.Tensor:
        told.append(("copied", keys))
        return fill(self, source)

    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(save, "_device_of", lambda boxes: torch.device("cuda"))
    monkeypatch.setattr(save, "stream_beside", lambda device: Stream())
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    refused, taken = Copy(15 * MIB), Copy(16 * MIB)
    assert refused.take(boxes) is None and refused.held_bytes == 0
    copy = taken.take(boxes)
    assert copy is not None and torch.equal(copy["weight/x"][0].values, values)
    assert taken.held_bytes == 16 * MIB
    assert told == [("pinned", True), ("copied", {"non_blocking": True})]


def test_ranks_on_a_cpu_beside_gpus_use_none_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu, the thread that writes would take memory of GPU 0."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert own_device() is None
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert own_device() == 0
