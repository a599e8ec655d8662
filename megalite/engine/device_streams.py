"""Makes streams wait for each other where DeepSpeed would make the host wait for a GPU in the middle of a step.

None of it applies to a CPU, which runs everything synchronously; tests/streams.py makes DeepSpeed treat a CPU as a
device with streams.
"""

import copy
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from torch import Tensor


@contextmanager
def without_device_waits() -> Iterator[None]:
    """Inside, DeepSpeed uses an accelerator whose `synchronize` returns at once."""
    own = get_accelerator()
    twin: Any = copy.copy(own)
    twin.__class__ = _patient(type(own))
    set_accelerator(twin)
    try:
        yield
    finally:
        set_accelerator(own)


@functools.cache
def _patient(kind: type) -> type:
    """A subclass of a DeepSpeed accelerator in which the host never waits for a device."""
    return type(f"Patient{kind.__name__}", (kind,), {"synchronize": lambda self, *args: None})


def wait_for(stream: Any) -> None:
    """Makes the current stream wait for all work queued on `stream`; the host does not wait."""
    accelerator: Any = get_accelerator()
    if not accelerator.resolves_data_dependency():
        accelerator.current_stream().wait_stream(stream)


def wait_on_the_host() -> None:
    """Makes the host wait for all work queued on the current stream, before it reads memory that the work writes."""
    accelerator: Any = get_accelerator()
    if not accelerator.resolves_data_dependency():
        event = accelerator.Event()
        event.record(accelerator.current_stream())
        event.synchronize()


def make_follow(stream: Any) -> None:
    """Makes `stream` wait for all work queued on the current stream. stream: one of DeepSpeed's; None on a CPU."""
    accelerator: Any = get_accelerator()
    if stream is not None and not accelerator.resolves_data_dependency():
        stream.wait_stream(accelerator.current_stream())


def join_on_the_device(stream: Any) -> None:
    """Replaces `stream.synchronize()` by `wait_for`. stream: one that DeepSpeed keeps; None on a CPU."""
    if stream is not None:
        stream.synchronize = functools.partial(wait_for, stream)


def release_page_locked() -> None:
    """Gives page-locked memory that is no longer used back to the node: torch would keep it for later tensors."""
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        torch.accelerator.empty_host_cache()


def copy_without_waiting(host: Any) -> None:
    """Replaces `host.to` by one for which the host does not wait, if the memory is page-locked. host: a tensor in main
    memory that is overwritten only after the host has waited for the copies."""
    # A strong reference would be a cycle, and keep the memory until it is collected.
    own = weakref.ref(host)

    def to(*args: Any, **kwargs: Any) -> Tensor:
        held: Any = own()
        return Tensor.to(held, *args, **kwargs | {"non_blocking": True})

    host.to = to
