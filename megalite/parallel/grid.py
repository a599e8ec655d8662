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
from typing import Any

import torch.distributed as dist

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
    def build(cls, pipe: int, tensor: int) -> "Grid":
        """Makes every group, in the same order on all ranks (collective over the world).

        The data axis is what is left of the world; sizes that do not divide it are a caller's mistake, which
        the config's rules have refused before.
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
            "ends": [sorted({at(0, d, t), at(pipe - 1, d, t)}) for d in range(data) for t in range(tensor)],
        }
        clock = Clock()
        axes = {name: _axis_through(rank, groups, clock) for name, groups in lines.items()}
        runs = [
            [line[i : i + size] for line in lines["tensor"] for i in range(0, tensor, size)]
            for size in range(2, tensor)
            if tensor % size == 0
        ]
        axes["pipe"] = replace(axes["pipe"], back=_axis_through(rank, lines["pipe"], clock).group)
        axes["tensor"] = replace(axes["tensor"], runs=tuple(_axis_through(rank, groups, clock) for groups in runs))
        return cls(**axes, world_size=world_size, rank=rank, clock=clock)

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


def _axis_through(rank: int, lines: Iterable[list[int]], clock: Clock) -> Axis:
    """Makes a group for every line and returns the one through `rank`. A rank that stands on none (a middle
    stage has no `ends`) gets an axis of its own."""
    mine = Axis(1, 0, (rank,), None, clock=clock)
    for ranks in lines:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = Axis(len(ranks), ranks.index(rank), tuple(ranks), group, clock=clock)
    return mine
