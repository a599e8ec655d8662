"""How the tokens of a step were distributed over the experts: metrics, and a line about experts without tokens."""

from collections.abc import Callable

import torch

from megalite.engine.engine import Engine
from megalite.engine.router_bias import expert_counts
from megalite.training.watchers import Row, Watcher

LAYERS_SHOWN = 3  # layers named in a line


class ExpertLoad(Watcher):
    """Reports the load of the experts of a run."""

    def __init__(self, engine: Engine, interval: int, log: Callable[[str], None]) -> None:
        """interval: steps between two reports; 0: none. log: takes lines for the log."""
        self.engine, self.interval, self.log = engine, interval, log
        self.mixture = engine.stage.spec.mixture
        self.device = torch.device(engine.device or "cpu")

    def after_step(self, row: Row) -> None:
        """Adds the load to the row at every `interval`-th step (collective at those)."""
        step = row["step"]
        if self.interval == 0 or step % self.interval:
            return
        counts = expert_counts(self.engine.stage, self.engine.grid, self.device).tolist()
        layers = dict(zip(map(str, self.mixture.layers), counts, strict=True))
        row["expert_tokens"] = layers
        row["expert_imbalance"] = max(
            max(counts) * len(counts) / max(1, sum(counts)) for counts in layers.values()
        )
        for line in _dead_lines(step, layers):
            self.log(line)


def _dead_lines(step: int, layers: dict[str, list[int]]) -> list[str]:
    """A line about experts without tokens, if there are any."""
    dead = {
        layer: ", ".join(str(expert) for expert, count in enumerate(row) if count == 0)
        for layer, row in layers.items()
        if 0 in row
    }
    if not dead:
        return []
    lines = [f"layer {layer}: {experts}" for layer, experts in dead.items()]
    rest = f"; and in {len(lines) - LAYERS_SHOWN} more layers" if len(lines) > LAYERS_SHOWN else ""
    return [f"step {step}: experts without tokens: {'; '.join(lines[:LAYERS_SHOWN])}{rest}"]
