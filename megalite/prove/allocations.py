"""Peak of torch's allocations, also on a CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = "all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor"
PATIENCE = 0.1  # seconds to wait for a tensor that another thread holds


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak bytes that torch allocates in `work`, from its profiler.

    The profiler sees only this thread. Memory that another thread frees, as gloo's may do with sent tensors, is noticed
    when its address is allocated again.
    """
    with _freed_by_this_thread(), torch.profiler.profile(profile_memory=True) as profile:
        work()
    result: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(_memory_events(result.experimental_event_tree()))
    now = highest = 0
    held: dict[int, int] = {}
    for _, address, size in events:
        before = held.pop(address, 0)
        if size > 0:
            now -= before  # freed by another thread
            held[address] = size
        now += size
        highest = max(highest, now)
    return highest


def _memory_events(roots: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each allocation; bytes are negative when it is freed."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        if event.name == "[memory]":
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        waiting += event.children


@contextmanager
def _freed_by_this_thread() -> Iterator[None]:
    """Inside, a collective returns once it is complete and no other thread holds its tensors."""
    collectives = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, collective in collectives.items():
        setattr(dist, name, _patient(collective))
    try:
        yield
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)


class _Done:
    """The work handle of a completed collective."""

    def wait(self) -> bool:
        return True


def _patient(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, async_op: bool = False, **keys: Any) -> _Done | None:
        tensors = [value for value in (*args, *keys.values()) if isinstance(value, Tensor)]
        before = [_uses(tensor) for tensor in tensors]
        collective(*args, **keys)
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if all(_uses(tensor) <= uses for tensor, uses in zip(tensors, before, strict=True)):
                break
            time.sleep(0)
        return _Done() if async_op else None

    return call


def _uses(tensor: Tensor) -> int:
    """Reference count of the tensor's storage, over all threads."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
