"""Where DeepSpeed has the host wait for a GPU in the middle of a step, the streams wait for each other instead.

None of it happens on a CPU, which does all at once; tests/streams.py has DeepSpeed take a CPU for a device with
streams.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import NoGatherCoalescedHandle, NoGatherHandle


@contextmanager
def accelerator_with(**methods: Callable[..., Any]) -> Iterator[None]:
    """DeepSpeed's accelerator with these methods in place of its own."""
    own = vars(get_accelerator())
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]


def wait_for(stream: Any) -> None:
    """The current stream waits for all that was asked of another; the host for nothing."""
    accelerator: Any = get_accelerator()
    if not accelerator.resolves_data_dependency():
        accelerator.current_stream().wait_stream(stream)


def join_on_the_device(stream: Any) -> None:
    """From now on `stream.synchronize()` is `wait_for`. stream: one that DeepSpeed keeps; None on a CPU."""
    if stream is not None:
        stream.synchronize = functools.partial(wait_for, stream)


def gather_without_waiting() -> None:
    """Weights that a rank has alone, copied from main memory with offload_param, need no wait of the host: the
    coordinator has the step's stream wait for the one that copies (runtime/zero/partitioned_param_coordinator.py,
    fetch_sub_module)."""
    for handle in (NoGatherHandle, NoGatherCoalescedHandle):
        if not hasattr(handle.wait, "__wrapped__"):
            handle.wait = _on_the_device(handle.wait)


def _on_the_device(wait: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(wait)
    def without_the_host(self: Any, **kwargs: Any) -> None:
        with accelerator_with(resolves_data_dependency=lambda: True):
            wait(self, **kwargs)

    return without_the_host
