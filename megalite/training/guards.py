"""Watchers on every rank that detect faulty ranks: diverged replicas and stragglers. Next: watching.py."""

from collections.abc import Callable

import torch

from megalite.config import Config
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.errors import TrainingError
from megalite.guard.health import Health
from megalite.guard.pace import Pace
from megalite.guard.replicas import Replicas
from megalite.training.watchers import Row, Watcher


class ReplicaGuard(Watcher):
    """Stops the run if a rank's copy of a weight differs from the other copies."""

    def __init__(self, config: Config, engine: Engine, health: Health) -> None:
        self.interval = config.train.faults.replica_check_interval
        self.replicas, self.health = Replicas(engine.stage), health
        self.device = torch.device(engine.device or "cpu")

    def after_step(self, row: Row) -> None:
        """Compares all copies at every `replica_check_interval`-th step (collective)."""
        step, interval = row["step"], self.interval
        if interval == 0 or step % interval or self.health.fault is not None:
            return
        if (found := self.replicas.difference(self.device)) is not None:
            since = f"checkpoints of steps after {step - interval} may contain it"
            raise TrainingError(f"step {step}: {found.line(self.health.hosts)}; {since}")


class PaceGuard(Watcher):
    """Reports stragglers."""

    def __init__(self, pace: Pace, log: Callable[[str], None]) -> None:
        self.pace, self.log = pace, log

    def before_step(self, position: Position) -> None:
        """Starts the clock if the step is to be measured."""
        self.pace.begin(position.step + 1)

    def after_step(self, row: Row) -> None:
        """Adds the figures of a measured step (collective in those)."""
        figures, lines = self.pace.end(row["step"])
        row |= figures
        for line in lines:
            self.log(line)
