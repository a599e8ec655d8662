"""The grid of ranks: this rank's position on each named axis, and the process groups along the axes.

topology/axes.py defines how ranks are numbered and which groups exist. Next: collectives.py.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.limits import DEFAULT_TIMEOUT
from megalite.topology.axes import PLANES, AxisSizes


@dataclass(frozen=True)
class Axis:
    """One group of the grid that contains this rank.

    size: number of ranks in it; rank: this rank's index in it; ranks: their global ranks, in order; group: the process
    group, None if nothing is distributed (size 1); back: on the pipe axis, a second group of the same ranks for
    messages to a lower index (`towards`); runs: for each length that the axis can be cut into, the run of neighbouring
    ranks that contains this rank, as an axis; name: as in topology/axes.py.
    """

    size: int
    rank: int
    ranks: tuple[int, ...]
    group: Any
    runs: tuple["Axis", ...] = ()
    back: Any = None
    name: str = ""

    def run(self, size: int) -> "Axis":
        """The run of `size` neighbouring ranks that contains this rank; `size` divides the axis's size."""
        if size == 1:
            return Axis(1, 0, (self.ranks[self.rank],), None, name=self.name)
        return next(axis for axis in (self, *self.runs) if axis.size == size)

    def towards(self, source: int, target: int) -> Any:
        """The group for a message from index `source` to `target` on the axis. NCCL processes the messages of a
        communicator in order, and a send may block until its receive: if both directions shared a communicator, two
        neighbours that both send first would deadlock."""
        return self.group if source < target else self.back

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


ALONE = Axis(1, 0, (0,), None)


@dataclass(frozen=True)
class Grid:
    """This rank's groups, named as in topology/axes.py. `ends`: the first and last stage of this pipeline, which share
    a tied embedding; on middle stages this rank alone."""

    pipe: Axis = ALONE
    data: Axis = ALONE
    context: Axis = ALONE
    tensor: Axis = ALONE
    expert: Axis = ALONE
    replica: Axis = ALONE
    expert_replica: Axis = ALONE
    model: Axis = ALONE
    ends: Axis = ALONE
    world_size: int = 1
    rank: int = 0
    sizes: AxisSizes = AxisSizes()

    @classmethod
    def build(
        cls,
        pipe: int,
        tensor: int,
        context: int = 1,
        expert: int = 1,
        timeout: timedelta = DEFAULT_TIMEOUT,
        key_heads: int | None = None,
    ) -> "Grid":
        """Creates every group in the same order on all ranks (collective over the world), and on GPUs connects them.

        The data axis takes the rest of the world. timeout: for each collective. key_heads: of the model; if there are
        fewer of them than tensor ranks, the ranks that share one form a group. None: a group for every possible number.
        """
        rank = dist.get_rank()
        sizes = AxisSizes.of_world(dist.get_world_size(), pipe, tensor, context, expert)
        device, backend = backend_of_axes(dist.get_backend_config())
        makes = _GroupMaker(rank, backend, timeout)
        axes = {name: makes.axis(name, sizes.groups(name)) for name in PLANES}
        axes["ends"] = makes.axis("ends", sizes.ends())
        back = makes.group(sizes.groups("pipe"), again=True)
        axes["pipe"] = replace(axes["pipe"], back=back)
        wanted = [size for size in range(2, tensor) if tensor % size == 0]
        if key_heads is not None:
            wanted = [size for size in wanted if size == tensor // key_heads]
        runs = tuple(makes.axis("tensor", sizes.runs("tensor", size)) for size in wanted)
        axes["tensor"] = replace(axes["tensor"], runs=runs)
        grid = cls(**axes, world_size=sizes.world_size, rank=rank, sizes=sizes)
        if device != "cpu":
            grid.connect(torch.device(device))
        return grid

    def axes(self) -> Iterator[Axis]:
        """Every axis of more than one rank, including runs, in the same order on all ranks; each group once."""
        seen = set()
        for axis in (*(getattr(self, name) for name in PLANES), self.ends, *self.tensor.runs):
            if axis.size > 1 and axis.group not in seen:
                seen.add(axis.group)
                yield axis

    def connect(self, device: torch.device) -> None:
        """Creates every NCCL communicator by a message on each, in the same order on all ranks (collective).

        NCCL creates a group's communicator at its first collective, and one for each pair of ranks at their first
        message, and blocks until all members take part. In the middle of a step, ranks would reach them in different
        orders, and two ranks that block on different communicators would deadlock.
        """
        message = torch.zeros(1, device=device)
        dist.all_reduce(message)
        for axis in self.axes():
            # DeepSpeed gets `model` for its norm and overflow check, which ours replace: no message uses it.
            if axis.name != "model":
                dist.all_reduce(message, group=axis.group)
        pipe = self.pipe
        for here in range(pipe.size if pipe.size > 1 else 0):
            # Neighbours, and the last rank with the first, which interleaved schedules connect.
            there = (here + 1) % pipe.size
            for source, target in ((here, there), (there, here)):
                if pipe.rank == source:
                    dist.send(message, pipe.ranks[target], group=pipe.towards(source, target))
                elif pipe.rank == target:
                    dist.recv(message, pipe.ranks[source], group=pipe.towards(source, target))

    @classmethod
    def at(
        cls, rank: int, pipe: int, data: int, tensor: int, context: int = 1, expert: int = 1
    ) -> "Grid":
        """The grid of a given rank without process groups or an initialised world, for planning and prediction."""
        sizes = AxisSizes(pipe, data, context, tensor, expert)

        def axis(name: str) -> Axis:
            size, index = sizes.along(name), sizes.place(rank, name)
            cut = range(2, size) if name == "tensor" else ()  # as in `build`
            divisors = [n for n in cut if size % n == 0]
            runs = tuple(Axis(n, index % n, (), None, name=name) for n in divisors)
            return Axis(size, index, _counted(size), None, runs, name=name)

        axes = {name: axis(name) for name in PLANES}
        return cls(**axes, world_size=sizes.world_size, rank=rank, sizes=sizes)

    # The methods that DeepSpeed expects of an "mpu". Its "model parallel" group is our plane pipe × tensor; its
    # data-parallel group is all ranks with copies of a weight.
    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_group(self) -> Any:
        return self.model.group

    def get_data_parallel_rank(self) -> int:
        return self.replica.rank

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks that divide a batch's samples: DeepSpeed checks train_batch_size with it
        (runtime/config.py:602). For averages and shards it uses the size of the group, which includes the context
        axis."""
        return self.data.size

    def get_data_parallel_group(self) -> Any:
        return self.replica.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tensor.group


def backend_of_axes(config: str) -> tuple[str, str]:
    """(device type, backend) for the groups along axes. config: the world's, such as cpu:gloo,cuda:nccl. Objects are
    sent only over the world, so groups along axes need no gloo, which would open descriptors and threads for each."""
    backends = dict(part.split(":") for part in config.split(","))
    if len(set(backends.values())) == 1:  # one for all devices, such as gloo on a CPU
        return "cpu", backends["cpu"]
    return next((device, backend) for device, backend in backends.items() if device != "cpu")


class _GroupMaker:
    """Creates process groups. Groups of the same ranks under two names (`data` and `replica` without a context axis)
    are created once."""

    def __init__(self, rank: int, backend: str, timeout: timedelta) -> None:
        self.rank, self.backend, self.timeout = rank, backend, timeout
        self.made: dict[tuple[int, ...], Any] = {}

    def axis(self, name: str, lines: list[list[int]]) -> Axis:
        """Creates a group for each line of ranks and returns this rank's axis. A rank on none of the lines (a middle
        stage is not in `ends`) gets an axis of itself alone."""
        self.group(lines)
        mine = next((line for line in lines if self.rank in line), [self.rank])
        group = self.made.get(tuple(mine))
        return Axis(len(mine), mine.index(self.rank), tuple(mine), group, name=name)

    def group(self, lines: list[list[int]], again: bool = False) -> Any:
        """Creates a group for each line. again: creates new groups even if some of the same ranks exist, and returns
        this rank's."""
        found = None
        for line in lines:
            key = tuple(line)
            if again or key not in self.made:
                group = dist.new_group(line, self.timeout, self.backend)
                if again:
                    found = group if self.rank in line else found
                else:
                    self.made[key] = group
        return found


@functools.cache
def _counted(size: int) -> tuple[int, ...]:
    """The numbers below `size`: one tuple for all the ranks of a large world."""
    return tuple(range(size))
