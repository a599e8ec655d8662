"""Times steps of several layouts on the same ranks in turns, so that a temporary slowdown of the machine affects all.

Next: ranking.py, which predicts them.
"""

from typing import Any

import torch
import torch.distributed as dist

from megalite.config import Config
from megalite.parallel.clock import wait_for
from megalite.prove.allocations import peak_bytes
from megalite.prove.clocks import Times
from megalite.prove.machine_rates import own_device
from megalite.prove.trace import Session

WARMUP_STEPS = 2
# The lowest peak of this many steps counts: memory freed by gloo's threads is noticed late or never (allocations.py).
WEIGHED_STEPS = 3


def in_turns(configs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """For each resolved config: the bytes of this rank's states, torch's peak allocation in a step, and `steps` timed
    steps (collective). All layouts stay in memory until the end."""
    own_device()
    layouts = [_LayoutTurns(Config.from_dict(config)) for config in configs]
    for _ in range(steps):
        for layout in layouts:
            layout.take()
    return [layout.result for layout in layouts]


class _LayoutTurns:
    """A layout on this rank."""

    def __init__(self, config: Config) -> None:
        self.session, self.number = Session.build(config), 0
        self.device = torch.device(self.session.engine.device or "cpu")
        self.result: dict[str, Any] = {"times": []}
        with self.session.engine.weighed() as held:
            self._step()
        self.result.update(held)
        for _ in range(WARMUP_STEPS - 1):
            self._step()
        self.result["peak_bytes"] = min(self._peak() for _ in range(WEIGHED_STEPS))

    def _step(self) -> None:
        self.session.train(self.session.batches(self.number))
        self.number += 1

    def _peak(self) -> int:
        """Peak of torch's allocations in one step."""
        if self.device.type == "cpu":
            held = sum(self.session.engine.state_bytes().values())
            return held + peak_bytes(self._step)
        wait_for(self.device)
        module: Any = torch.get_device_module(self.device)
        others = module.memory_allocated() - sum(self.session.engine.state_bytes().values())
        module.reset_peak_memory_stats()
        self._step()
        return module.max_memory_allocated() - others

    def take(self) -> None:
        """Runs one timed step; all ranks start it together."""
        batches = self.session.batches(self.number)
        self.number += 1
        wait_for(self.device)
        dist.barrier()
        begin = Times.now()
        self.session.train(batches)
        wait_for(self.device)
        self.result["times"].append(Times.now().since(begin))
