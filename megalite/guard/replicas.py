"""Finds a rank that has silently diverged: compares copies of a weight that should be bitwise equal.

Copies exist along the data and context axes (ZeRO 0 to 2; under ZeRO-3 of weights that stay whole), along the tensor
axis (norms, copies of key/value heads) and at both ends of the pipe (tied embeddings): everything with the same name
and range. A copy is hashed by the exclusive or of its elements, in one pass over the weights. This detects any changed
bit, but not elements that were swapped.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalite.parallel.layers import Placement, placed

Key = tuple[str, tuple[int, ...]]  # full name, first index in each dim
_ABSENT = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class ReplicaDifference:
    """A tensor whose copies differ. ranks: those that hold another value than most; if there is no majority
    (`divided`), all that hold the tensor."""

    name: str
    ranks: tuple[int, ...]
    divided: bool

    def line(self, hosts: Sequence[str]) -> str:
        """A line for the log. hosts: by rank."""
        ranks = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in self.ranks)
        how = (
            "hold different values, and no majority says which is right"
            if self.divided
            else "holds another value"
        )
        return f"{self.name}: {ranks} {how}: copies of a weight must be bitwise equal"


class Replicas:
    """The copies of one model. The constructor is collective over the world."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        mine = [_key(placement) for _, placement in placed(module)]
        everyone: list[list[Key]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        self.rows = {
            key: row for row, key in enumerate(sorted({key for keys in everyone for key in keys}))
        }

    def difference(self, device: torch.device) -> ReplicaDifference | None:
        """The first tensor, by name, whose copies differ now; the same on every rank (collective)."""
        own = self._hashes(device)
        # The highest and the lowest hash of each row, in one message.
        both = torch.stack([own, torch.where(own == _ABSENT, own, -own)])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        wrong = ((both[0] != _ABSENT) & (both[0] != -both[1])).nonzero().flatten().tolist()
        if not wrong:
            return None
        everyone: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, int(own[wrong[0]]))
        held = {rank: value for rank, value in enumerate(everyone) if value != _ABSENT}
        (most, count), *others = Counter(held.values()).most_common()
        divided = others[0][1] == count
        ranks = tuple(rank for rank, value in held.items() if divided or value != most)
        return ReplicaDifference(
            next(name for (name, _), row in self.rows.items() if row == wrong[0]), ranks, divided
        )

    def _hashes(self, device: torch.device) -> Tensor:
        """Hashes, int64 by row, in [-2⁶², 2⁶²) so that they can be negated; _ABSENT if this rank holds no whole
        copy."""
        result = torch.full((len(self.rows),), _ABSENT, device=device)
        for value, placement in placed(self.module):
            if value.numel() == prod(placement.shape):
                # Dropping the lowest bit is safe: elements are hashed as fp64, in which a widened number's lowest bit
                # is 0.
                result[self.rows[_key(placement)]] = (
                    torch.hash_tensor(value.detach()).view(torch.int64) >> 1
                )
        return result


def _key(placement: Placement) -> Key:
    return placement.name, placement.offsets
