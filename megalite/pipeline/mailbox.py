"""Messages between one rank and others on the pipe axis: receives are posted early, sends are kept until they complete.

Each direction has its own process group (Axis.towards), and the caller decides the order (steps.py), so that NCCL's
rules about messages on one stream cannot cause a hang. Nothing here blocks the host on a device: the device's stream
waits. Next: interpreter.py.
"""

from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.grid import Axis


class Mailbox:
    """Sends and receives values by key. waits_for: the global rank whose message the host is waiting for, for the
    report of a hang."""

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self.axis, self.device = axis, device
        self.waits_for: int | None = None
        self._posted: dict[Hashable, tuple[Any, Tensor, int]] = {}
        self._sent: dict[Hashable, tuple[Any, Tensor, int]] = {}

    def post(self, key: Hashable, source: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Posts the receive of a value from an index on the axis."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        rank = self.axis.ranks[source]
        work = dist.irecv(tensor, rank, group=self.axis.towards(source, self.axis.rank))
        self._posted[key] = work, tensor, rank

    def take(self, key: Hashable) -> Tensor:
        """Returns a value whose receive was posted; computation waits for it."""
        work, tensor, rank = self._posted.pop(key)
        self._wait(work, rank)
        return tensor

    def send(self, key: Hashable, tensor: Tensor, target: int) -> None:
        """Sends a value to an index on the axis, without waiting."""
        self._forget_gone()
        tensor, rank = tensor.contiguous(), self.axis.ranks[target]
        work = dist.isend(tensor, rank, group=self.axis.towards(self.axis.rank, target))
        self._sent[key] = work, tensor, rank

    def wait(self, key: Hashable) -> None:
        """Waits until the send of a value is complete."""
        if key in self._sent:
            work, _, rank = self._sent.pop(key)
            self._wait(work, rank)

    def finish(self) -> None:
        """Waits until all sends are complete."""
        for key in list(self._sent):
            self.wait(key)
        assert not self._posted, f"received and never used: {list(self._posted)}"

    def _wait(self, work: Any, rank: int) -> None:
        self.waits_for = rank
        with RANK_CLOCK.waiting():
            work.wait()
        self.waits_for = None

    def _forget_gone(self) -> None:
        self._sent = {
            key: entry for key, entry in self._sent.items() if not entry[0].is_completed()
        }
