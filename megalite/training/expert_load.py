"""How the tokens of a step were spread over the experts: rows of metrics, and a line about experts without a token."""

from typing import Any

import torch
import torch.distributed as dist

from megalite.engine.engine import Engine

LAYERS_TOLD = 3  # of a line


class ExpertLoad:
    """Of one run on this rank; every rank has one and calls it at the same steps."""

    def __init__(self, engine: Engine, interval: int) -> None:
        """interval: steps between two reports; 0: none."""
        self.engine, self.interval = engine, interval
        self.mixture = engine.stage.spec.mixture

    def report(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """Fields of a step's row, and lines for the log (collective at the steps that report)."""
        if self.mixture is None or self.interval == 0 or step % self.interval:
            return {}, []
        counts = self._counts()
        layers = dict(zip(map(str, self.mixture.layers), counts, strict=True))
        uneven = max(max(row) * len(row) / max(1, sum(row)) for row in counts)
        fields = {"expert_tokens": layers, "expert_imbalance": uneven}
        return fields, list(_dead_lines(step, layers))

    def _counts(self) -> list[list[int]]:
        """Tokens of each layer's experts in the last step, over all ranks."""
        assert self.mixture is not None
        grid, layers = self.engine.grid, self.mixture.layers
        counts = torch.zeros(
            len(layers), self.mixture.count, dtype=torch.int64, device=self.engine.device
        )
        for layer, router in self.engine.stage.routers.items():
            counts[layers.index(layer)] = router.tally
        dist.all_reduce(counts)
        return (counts // grid.tensor.size).tolist()  # its ranks have counted the same


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
