"""The grid of ranks: the sizes of its named axes, and the groups of ranks along them. Needs no torch.

Ranks are numbered with `pipe` outermost and `tensor` innermost, so that the axis that communicates most stays within a
host. A world of 8 with pipe 2 × data 2 × tensor 2:

    pipe 0:  data 0: ranks 0 1     data 1: ranks 2 3
    pipe 1:  data 0: ranks 4 5     data 1: ranks 6 7

Rank 5 is at pipe 1, data 0, tensor 1; its tensor group is (4, 5), its data group (5, 7), its pipe group (1, 5).

The `context` axis, between data and tensor, divides the tokens of each sample (parallel/rows.py).
The `expert` axis adds no ranks: it divides `data` into runs of neighbouring ranks, and `expert_data` counts the runs.
Next: parallel/grid.py, which makes the process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

AXES = ("pipe", "expert_data", "expert", "context", "tensor")
"""Outermost first; `data` is expert_data × expert."""

PLANES: dict[str, tuple[str, ...]] = {
    "pipe": ("pipe",),
    "data": ("expert_data", "expert"),
    "context": ("context",),
    "tensor": ("tensor",),
    "expert": ("expert",),
    "replica": ("expert_data", "expert", "context"),
    "expert_replica": ("expert_data", "context"),
    "model": ("pipe", "tensor"),
}
"""The axes that vary within a group, by the group's name. A `replica` group holds the copies of a weight: ZeRO shards
over it and gradients are averaged over it; `expert_replica` is the same for an expert's weight. `model` is one whole
copy of the model."""

SHOWN_AXES = ("pipe", "data", "context", "expert", "tensor")
"""The axes that users see, in messages and figures."""


@dataclass(frozen=True)
class AxisSizes:
    """Ranks along each axis."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        assert self.data % self.expert == 0, self

    @classmethod
    def of_world(
        cls, world_size: int, pipe: int, tensor: int, context: int, expert: int
    ) -> "AxisSizes":
        """The sizes of a world whose other axes are given; the data axis takes the rest. The config's rules have
        already rejected sizes that do not divide the world."""
        data = world_size // (pipe * context * tensor)
        sizes = cls(pipe, data, context, tensor, expert)
        assert sizes.world_size == world_size, (sizes, world_size)
        return sizes

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes that number the ranks, outermost first; context only if its size is above 1."""
        context = {"context": self.context} if self.context > 1 else {}
        return {"pipe": self.pipe, "data": self.data, **context, "tensor": self.tensor}

    @property
    def world_size(self) -> int:
        return prod(self.along(name) for name in AXES)

    def along(self, name: str) -> int:
        """Number of ranks along one of AXES, or in a group of one of PLANES."""
        if name == "expert_data":
            return self.data // self.expert
        if name in PLANES and PLANES[name] != (name,):
            return prod(self.along(axis) for axis in PLANES[name])
        return getattr(self, name)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's index along each of AXES."""
        result = {}
        for name in reversed(AXES):
            rank, result[name] = divmod(rank, self.along(name))
        return result

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """The inverse of `coordinates`."""
        rank = 0
        for name in AXES:
            rank = rank * self.along(name) + coordinates[name]
        return rank

    def index(self, rank: int, name: str) -> int:
        """The rank's index in its group of that name."""
        coordinates, index = self.coordinates(rank), 0
        for axis in PLANES[name]:
            index = index * self.along(axis) + coordinates[axis]
        return index

    def described(self, rank: int) -> str:
        """A rank's coordinates for messages: `pipe 1, data 0, tensor 1`; context and expert only if above size 1."""
        always = ("pipe", "data", "tensor")
        names = [name for name in SHOWN_AXES if name in always or self.along(name) > 1]
        return ", ".join(f"{name} {self.index(rank, name)}" for name in names)

    def groups(self, name: str) -> list[list[int]]:
        """All groups of that name, as lists of ranks in order."""
        return self.lines(PLANES[name])

    def lines(self, names: Sequence[str]) -> list[list[int]]:
        """All groups in which only the named axes (of AXES) vary, as lists of ranks in order."""
        fixed = [name for name in AXES if name not in names]
        result = []
        for outer in product(*(range(self.along(name)) for name in fixed)):
            line = []
            for inner in product(*(range(self.along(name)) for name in names)):
                at = dict(zip(fixed, outer, strict=True)) | dict(zip(names, inner, strict=True))
                line.append(self.rank_at(at))
            result.append(line)
        return result

    def ends(self) -> list[list[int]]:
        """The ranks of the first and last stage of each pipeline, which share a tied embedding."""
        return [sorted({line[0], line[-1]}) for line in self.groups("pipe")]

    def runs(self, name: str, size: int) -> list[list[int]]:
        """The groups of that name, cut into runs of `size` neighbouring ranks; `size` divides the groups' size."""
        return [
            line[first : first + size]
            for line in self.groups(name)
            for first in range(0, len(line), size)
        ]


def in_short(ranks: list[int], dash: str = "-") -> str:
    """Ascending ranks in short form: 0-3, 6, 8-9."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return ", ".join(dash.join(map(str, part)) for part in parts)
