"""How the tokens of a step were spread over the experts: rows of metrics, and a line about experts without a token."""

from typing import Any

import torch

from megalite.engine.engine import Engine
from megalite.engine.router_bias import expert_counts

LAYERS_TOLD = 3  # of a line


class ExpertLoad:
    """Of one run on this rank; every rank has one and calls it at the same steps."""

    def __init__(self, engine: Engine, interval: int) -> None:
        """interval: steps between two reports; 0: none."""
        self.engine, self.interval = engine, interval
        self.mixture = engine.stage.spec.mixture
        self.device = torch.device(engine.device or "cpu")

    def report(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """Fields of a step's row, and lines for the log (collective at the steps that report)."""
        if self.mixture is None or self.interval == 0 or step % self.interval:
            return {}, []
        counts = expert_counts(self.engine.stage, self.engine.grid, self.device).tolist()
        layers = dict(zip(map(str, self.mixture.layers), counts, strict=True))
        uneven = max(max(row) * len(row) / max(1, sum(row)) for row in counts)
        fields = {"expert_tokens": layers, "expert_imbalance": uneven}
        return fields, list(_dead_lines(step, layers))


def _dead_lines(step: int, layers: dict[str, list[int]]) -> list[str]:
    """At most one."""
    dead = {
        layer: ", ".join(str(expert) for expert, count in enumerate(row) if count == 0)
        for layer, row in layers.items()
        if 0 in row
    }
    if not dead:
        return []
    told = [f"layer {layer}: {experts}" for layer, experts in dead.items()]
    rest = f"; and in {len(told) - LAYERS_TOLD} more layers" if len(told) > LAYERS_TOLD else ""
    return [f"step {step}: experts without a token: {'; '.join(told[:LAYERS_TOLD])}{rest}"]
