"""Memory limit for the copy of a checkpoint (megalite/checkpoint/save.py)."""

import contextlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint import save
from megalite.checkpoint.boxes import Box
from megalite.checkpoint.save import Copy, Saver, own_device, taken_bytes

MIB = 2**20


class Stream(contextlib.nullcontext[None]):
    """A device's stream, which completes everything at once."""

    def wait_stream(self, other: Any) -> None: ...

    def record_event(self) -> None: ...

    def synchronize(self) -> None: ...


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


class HostAllocator:
    """Stands in for torch's allocator of pinned memory, which keeps what is freed until its cache is emptied."""

    def __init__(self) -> None:
        self.live, self.cached, self.most = 0, 0, 0

    def empty(self, count: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        made = EMPTY(count, dtype=dtype)
        size = taken_bytes(made.nbytes, pin_memory)
        weakref.finalize(made.untyped_storage(), self._free, size)
        self.live += size
        self.most = max(self.most, self.live + self.cached)
        return made

    def _free(self, size: int) -> None:
        self.live, self.cached = self.live - size, self.cached + size

    def empty_cache(self) -> None:
        self.cached = 0


EMPTY = torch.empty


def test_page_locked_memory_never_exceeds_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when checkpoints change their size, nor after one that does not fit."""
    host = HostAllocator()
    monkeypatch.setattr(torch, "empty", host.empty)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", host.empty_cache)
    monkeypatch.setattr(save, "_device_of", lambda boxes: torch.device("cuda"))
    monkeypatch.setattr(save, "stream_beside", lambda device: Stream())
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    copy = Copy(16 * MIB)

    def take(*mib: int) -> bool:
        dtypes = (torch.float32, torch.bfloat16)
        boxes = {}
        for size, dtype in zip(mib, dtypes, strict=False):
            values = torch.zeros(size * MIB // dtype.itemsize, dtype=dtype)
            boxes[f"weight/{dtype}"] = [Box((len(values),), (0,), values)]
        return copy.take(boxes) is not None

    assert take(8, 4) and host.live + host.cached == copy.held_bytes == 12 * MIB
    assert take(8, 8) and host.live + host.cached == copy.held_bytes == 16 * MIB
    assert take(4, 8) and host.live + host.cached == copy.held_bytes == 12 * MIB
    assert host.most <= 16 * MIB
    assert not take(32) and host.live + host.cached == copy.held_bytes == 0
    assert take(16) and host.most == 16 * MIB


def test_a_rank_whose_neighbour_has_no_memory_gives_its_own_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, released = Saver(tmp_path, keep=0), list[bool]()
    values = torch.zeros(4)

    def release(self: Copy, keep: Any = None) -> None:
        if keep is None:
            released.append(all(memory() is None for memory in views))

    views: list[Any] = []
    take = Copy.take

    def taken(self: Copy, boxes: Any) -> Any:
        result = take(self, boxes)
        assert result is not None
        views.extend(weakref.ref(box.values) for some in result.values() for box in some)
        return result

    monkeypatch.setattr(Copy, "take", taken)
    monkeypatch.setattr(Copy, "release", release)
    monkeypatch.setattr(Saver, "_everywhere", lambda self, here: False)
    saver.save(1, {"weight/x": [Box((4,), (0,), values)]}, {})
    saver.wait()
    assert released == [True]


def test_ranks_on_a_cpu_beside_gpus_use_none_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu, the thread that writes would take memory of GPU 0."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert own_device() is None
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert own_device() == 0
