"""Counts the bytes that this rank sends, by the axis of the grid: the measured communication cost of a layout.

Every collective of torch.distributed, including DeepSpeed's, goes through torch's dispatcher, where a dispatch mode
sees all of them.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.parallel.grid import Grid

# The share of a tensor that each of n ranks sends on average with ring algorithms (Thakur et al. 2005, sections 4.1 to
# 4.5): (index of the argument with the whole tensor, share).
_SHARES: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, lambda n: 2 * (n - 1) / n),
    "reduce_": (0, lambda n: (n - 1) / n),
    "broadcast_": (0, lambda n: (n - 1) / n),
    "allgather_": (0, lambda n: (n - 1) / n),
    "_allgather_base_": (0, lambda n: (n - 1) / n),
    "allgather_into_tensor_coalesced_": (0, lambda n: (n - 1) / n),
    "reduce_scatter_": (1, lambda n: (n - 1) / n),
    "_reduce_scatter_base_": (1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor_coalesced_": (1, lambda n: (n - 1) / n),
    "alltoall_base_": (1, lambda n: (n - 1) / n),  # if all parts are equal
    "send": (0, lambda n: 1.0),
}


class Traffic(TorchDispatchMode):
    """Use `with Traffic(grid) as traffic: …`, then `traffic.bytes["data"]`. Keys: the names of the grid's axes,
    including `ends` (for a tied embedding), and `other` (such as the whole world). Collectives are assumed to use ring
    algorithms."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._axis_of = {axis.group.group_name: axis.name for axis in grid.axes()}
        if grid.pipe.back is not None:
            self._axis_of[grid.pipe.back.group_name] = "pipe"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        entry = _SHARES.get(func._schema.name.removeprefix("c10d::"))
        script = next(
            (arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)), None
        )
        if entry is None or script is None:
            return
        argument, share = entry
        group = dist.ProcessGroup.unbox(script)
        whole = sum(leaf.nbytes for leaf in tree_leaves(args[argument]) if isinstance(leaf, Tensor))
        self.bytes[self._axis_of.get(group.group_name, "other")] += round(
            whole * share(group.size())
        )


def _is_group(script: Any) -> bool:
    return script._type().qualified_name().endswith("ProcessGroup")
