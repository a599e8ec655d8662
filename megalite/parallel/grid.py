"""The grid of ranks: three named axes and the process groups along them.

Not the model and not the engine: a rank learns here where it stands and whom it talks to. Next: collectives.py.

Ranks are numbered with `pipe` outermost and `tensor` innermost, so that the tensor axis, which talks most,
stays within a node. A world of 8 with pipe 2 × data 2 × tensor 2:

    pipe 0:  data 0: ranks 0 1     data 1: ranks 2 3
    pipe 1:  data 0: ranks 4 5     data 1: ranks 6 7

Rank 5 is at pipe 1, data 0, tensor 1; its tensor group is (4, 5), its data group (5, 7), its pipe group (1, 5).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.sections import DEFAULT_TIMEOUT
from megalite.parallel.clock import Clock


@dataclass(frozen=True)
class Axis:
    """One line of the grid through this rank.

    size: number of ranks on it; rank: this rank's place on it; ranks: their global ranks, in order;
    group: the process group, None where nothing is distributed (size 1); back: of the pipe axis, a second group of the
    same ranks, for messages to a lower place (`towards`); runs: shorter axes that cut this one in runs of neighbours
    of equal length, each the one through this rank; clock: knows what waiting for them costs.
    """

    size: int
    rank: int
    ranks: tuple[int, ...]
    group: Any
    runs: tuple["Axis", ...] = ()
    back: Any = None
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    def run(self, size: int) -> "Axis":
        """The run of `size` neighbours, a divisor of the axis's size, that holds this rank."""
        if size == 1:
            return Axis(1, 0, (self.ranks[self.rank],), None)
        return next(axis for axis in (self, *self.runs) if axis.size == size)

    def towards(self, source: int, target: int) -> Any:
        """The group for a message between two places on the axis. NCCL runs the messages of one communicator in order,
        and a send may wait for its receive: if both directions shared a communicator, two neighbours that send to each
        other first would wait for each other for ever."""
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
    """Where this rank stands. `model` is the plane pipe × tensor, one whole copy of the model; `ends` are the
    first and the last stage of this pipe line (they share tied embeddings), empty of meaning in between."""

    pipe: Axis = ALONE
    data: Axis = ALONE
    tensor: Axis = ALONE
    model: Axis = ALONE
    ends: Axis = ALONE
    world_size: int = 1
    rank: int = 0
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)

    @classmethod
    def build(cls, pipe: int, tensor: int, timeout: timedelta = DEFAULT_TIMEOUT) -> "Grid":
        """Makes every group, in the same order on all ranks (collective over the world); on GPUs connects them too.

        The data axis is what is left of the world; sizes that do not divide it are a caller's mistake, which
        the config's rules have refused before. timeout: of a collective.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        data = world_size // (pipe * tensor)
        assert pipe * data * tensor == world_size, (pipe, data, tensor, world_size)

        def at(p: int, d: int, t: int) -> int:
            return (p * data + d) * tensor + t

        pipes = range(pipe)
        lines = {
            "pipe": [[at(p, d, t) for p in pipes] for d in range(data) for t in range(tensor)],
            "data": [[at(p, d, t) for d in range(data)] for p in pipes for t in range(tensor)],
            "tensor": [[at(p, d, t) for t in range(tensor)] for p in pipes for d in range(data)],
            "model": [[at(p, d, t) for p in pipes for t in range(tensor)] for d in range(data)],
            "ends": [
                sorted({at(0, d, t), at(pipe - 1, d, t)})
                for d in range(data)
                for t in range(tensor)
            ],
        }
        clock, (device, backend) = Clock(), backend_of_axes(dist.get_backend_config())

        def through(groups: Iterable[list[int]]) -> Axis:
            return _axis_through(rank, groups, clock, backend, timeout)

        axes = {name: through(groups) for name, groups in lines.items()}
        runs = [
            [line[i : i + size] for line in lines["tensor"] for i in range(0, tensor, size)]
            for size in range(2, tensor)
            if tensor % size == 0
        ]
        axes["pipe"] = replace(axes["pipe"], back=through(lines["pipe"]).group)
        axes["tensor"] = replace(axes["tensor"], runs=tuple(through(groups) for groups in runs))
        grid = cls(**axes, world_size=world_size, rank=rank, clock=clock)
        if device != "cpu":
            grid.connect(torch.device(device))
        return grid

    def connect(self, device: torch.device) -> None:
        """One message on everything that NCCL makes a communicator for, in one order on all ranks (collective).

        NCCL makes a group's communicator at its first collective, and one for each pair of ranks at their first
        message; both ends must come there. In the middle of a step they would come in an order of their own, and two
        ranks that wait in different communicators wait for ever.
        """
        word = torch.zeros(1, device=device)
        dist.all_reduce(word)
        for axis in (self.pipe, self.data, self.tensor, self.model, self.ends, *self.tensor.runs):
            if axis.size > 1:
                dist.all_reduce(word, group=axis.group)
        pipe = self.pipe
        for here in range(pipe.size if pipe.size > 1 else 0):
            there = (
                here + 1
            ) % pipe.size  # neighbours, and the ends, which interleaved schedules join
            for source, target in ((here, there), (there, here)):
                if pipe.rank == source:
                    dist.send(word, pipe.ranks[target], group=pipe.towards(source, target))
                elif pipe.rank == target:
                    dist.recv(word, pipe.ranks[source], group=pipe.towards(source, target))

    @classmethod
    def at(cls, rank: int, pipe: int, data: int, tensor: int) -> "Grid":
        """Where a rank stands, to reckon with: without groups, and without an initialised world."""

        def axis(size: int, place: int) -> Axis:
            runs = tuple(Axis(n, place % n, (), None) for n in range(2, size) if size % n == 0)
            return Axis(size, place, tuple(range(size)), None, runs)

        return cls(
            pipe=axis(pipe, rank // (data * tensor)),
            data=axis(data, rank // tensor % data),
            tensor=axis(tensor, rank % tensor),
            world_size=pipe * data * tensor,
            rank=rank,
        )

    # What DeepSpeed asks of an "mpu". Its "model parallel" group is our plane pipe × tensor.
    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_group(self) -> Any:
        return self.model.group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> Any:
        return self.data.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tensor.group


def backend_of_axes(config: str) -> tuple[str, str]:
    """(type of device, backend) of the groups along axes, of the world's such as cpu:gloo,cuda:nccl. Objects go over
    the world alone, so groups along axes need no gloo, which has descriptors and threads of its own for each."""
    backends = dict(part.split(":") for part in config.split(","))
    if len(set(backends.values())) == 1:  # one for all devices, such as gloo on a CPU
        return "cpu", backends["cpu"]
    return next((device, backend) for device, backend in backends.items() if device != "cpu")


def _axis_through(
    rank: int, lines: Iterable[list[int]], clock: Clock, backend: str, timeout: timedelta
) -> Axis:
    """Makes a group for every line and returns the one through `rank`. A rank that is on none (a middle
    stage has no `ends`) gets an axis of its own."""
    mine = Axis(1, 0, (rank,), None, clock=clock)
    for ranks in lines:
        group = dist.new_group(ranks, timeout, backend)
        if rank in ranks:
            mine = Axis(len(ranks), ranks.index(rank), tuple(ranks), group, clock=clock)
    return mine
