"""Where DeepSpeed has the host wait for a GPU in the middle of a step, the streams wait for each other instead.

None of it happens on a CPU, which does all at once; tests/streams.py has DeepSpeed take a CPU for a device with
streams.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator, set_accelerator


@contextmanager
def without_device_waits() -> Iterator[None]:
    """Inside, DeepSpeed works with an accelerator whose `synchronize` returns at once."""
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
    """A subclass of a DeepSpeed accelerator in which the host waits for no device."""
    return type(f"Patient{kind.__name__}", (kind,), {"synchronize": lambda self, *args: None})


def wait_for(stream: Any) -> None:
    """The current stream waits for all that was asked of another; the host for nothing."""
    accelerator: Any = get_accelerator()
    if not accelerator.resolves_data_dependency():
        accelerator.current_stream().wait_stream(stream)


def join_on_the_device(stream: Any) -> None:
    """From now on `stream.synchronize()` is `wait_for`. stream: one that DeepSpeed keeps; None on a CPU."""
    if stream is not None:
        stream.synchronize = functools.partial(wait_for, stream)
