"""Records collectives, DeepSpeed's included, on the timeline of a step that is traced.

There is no hook for them: torch's profiler sees their kernels but not which ranks they wait for. So for that step the
functions of torch.distributed are wrapped, and also the two references that DeepSpeed takes at its start
(deepspeed/comm/torch.py:210). Asynchronous collectives are not recorded.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.comm import comm

from megalite.parallel.grid import Grid
from megalite.parallel.timeline import RANK_TIMELINE

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
TAKEN = ("all_gather_function", "reduce_scatter_function")  # attributes of DeepSpeed's backend
WORLD = "world"


@contextlib.contextmanager
def recording_collectives(grid: Grid) -> Iterator[None]:
    """Inside, each synchronous collective over an axis of the grid or the world is a span of RANK_TIMELINE, whose
    `what` is the names of the function and of the axis."""
    names = {axis.group.group_name: axis.name for axis in grid.axes()}
    with contextlib.ExitStack() as patches:
        wrapped = [(dist, name) for name in COLLECTIVES]
        wrapped += [(comm.cdb, name) for name in TAKEN if getattr(comm.cdb, name, None) is not None]
        for owner, name in wrapped:
            original = getattr(owner, name)
            patches.callback(setattr, owner, name, original)
            setattr(owner, name, _recorded(original, names))
        yield


def _recorded(function: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    parameters = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False)) | kwargs
        group = given.get("group")
        world = group is None or group is dist.group.WORLD
        axis = WORLD if world else names.get(group.group_name)  # type: ignore[union-attr]
        if axis is None or given.get("async_op"):  # e.g. the group of background saves
            return function(*args, **kwargs)
        with RANK_TIMELINE.span("collective", (function.__name__, axis)):
            return function(*args, **kwargs)

    return call
