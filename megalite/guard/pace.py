"""Straggler detection: names a rank that computes more slowly than the others, which wait for it and look just as slow.

Every `pace_interval` steps each rank's own seconds in forward, without waiting, are measured (parallel/clock.py) and
gathered. Stages differ in work, so seconds are divided by the multiply-adds of a rank's stage before they are compared
with the median of all ranks.
"""

import os
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from megalite.config.limits import Faults
from megalite.engine.engine import Engine
from megalite.model.spec import TransformerSpec
from megalite.parallel.clock import RANK_CLOCK


class Pace:
    """Straggler detection for one run. Every rank has one and must call it at the same steps."""

    def __init__(
        self,
        faults: Faults,
        engine: Engine,
        spec: TransformerSpec,
        counted: float,
        hosts: Sequence[str],
        source: float = 0.0,
    ) -> None:
        """counted: approximate share of the tokens for which the head's product is computed. source: share of the
        tokens that are an encoder-decoder's source."""
        self.faults, self.engine, self.hosts = faults, engine, hosts
        self.device = torch.device(engine.device or "cpu")
        stage = engine.stage
        head = counted * spec.head_weights if stage.head is not None else 0
        layers = [
            layer
            for chunk in stage.cut.chunks_of(engine.grid.pipe.rank)
            for layer in stage.cut.layers[chunk]
        ]
        parameters = (
            spec.layer_parameters(layer, used=True)
            if spec.stacks is None
            else spec.layer_work(layer, 1.0, source)[0]
            for layer in layers
        )
        self.work = float(sum(parameters) + head)
        self.slow: dict[int, list[str]] = {}

    @property
    def shares_cores(self) -> bool:
        """Whether this host's ranks have more threads than cores. The scheduler then decides which of them is slow, so
        no rank is named."""
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        threads = ranks * torch.get_num_threads()
        return self.device.type == "cpu" and threads > len(os.sched_getaffinity(0))

    def begin(self, step: int) -> None:
        """Call before a step: starts the clock if the step is to be measured."""
        interval = self.faults.pace_interval
        RANK_CLOCK.on = interval > 0 and step % interval == 0

    def end(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """Call after a step. Returns fields of its row and lines for the log (collective at the steps that are
        measured)."""
        if not RANK_CLOCK.on:
            return {}, []
        RANK_CLOCK.on = False
        own = [RANK_CLOCK.take(), self.work, float(self.shares_cores)]
        row = torch.tensor(own, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(row) for _ in range(self.engine.grid.world_size)]
        dist.all_gather(everyone, row)
        seconds, work, shared = torch.stack(everyone).t().tolist()
        figures, lines = self.judge(step, seconds, work)
        return figures, [] if any(shared) else lines

    def judge(
        self, step: int, seconds: list[float], work: list[float]
    ) -> tuple[dict[str, Any], list[str]]:
        """The result of `end`, from every rank's seconds in forward and its stage's work."""
        usual = median_low([s / w for s, w in zip(seconds, work, strict=True)])
        ratios = [s / (w * usual) for s, w in zip(seconds, work, strict=True)]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        lines = []
        for rank, ratio in enumerate(ratios):
            if ratio < self.faults.slow_factor:
                self.slow.pop(rank, None)
                continue
            seen = self.slow.setdefault(rank, [])
            if len(seen) == self.faults.slow_looks:
                continue  # already reported
            seen.append(f"step {step}: {seconds[rank]:.3g} s, {ratio:.2f} times the median")
            if len(seen) == self.faults.slow_looks:
                figures = "; ".join(seen)
                lines.append(
                    f"rank {rank} on {self.hosts[rank]} is slow: own time in forward at {figures}"
                )
        row = {
            "forward_seconds": max(seconds),
            "slowest_rank": worst,
            "slowest_ratio": ratios[worst],
        }
        return row, lines
