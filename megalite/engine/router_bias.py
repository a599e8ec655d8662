"""Token counts of experts over all ranks, and the bias with which `megalite.train.router.balance` "bias" balances them
(arXiv 2408.15664, algorithm 1).

A router adds the bias to its probabilities only to choose experts. After each update an expert's bias increases by
bias_rate if it got fewer tokens of the global batch than the layer's mean, and decreases if it got more. Counts are
integers and every rank has those of all layers, so the biases are the same on every layout. They are part of a
checkpoint's state.json.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.checkpoint.saved_bias import bias_of
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid


def expert_counts(stage: Stage, grid: Grid, device: torch.device) -> Tensor:
    """Tokens of each layer's experts in the last step, over all ranks, int64 [layers, E] (collective)."""
    mixture = stage.spec.mixture
    assert mixture is not None
    shape = len(mixture.layers), mixture.count
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    for layer, router in stage.routers.items():
        counts[mixture.layers.index(layer)] = router.tally
    dist.all_reduce(counts)
    return counts // grid.tensor.size  # all tensor ranks count the same tokens


class RouterBias:
    """The biases of a run whose model has experts. rate: change per step; 0: the biases are constant."""

    def __init__(self, stage: Stage, grid: Grid, device: torch.device, rate: float) -> None:
        mixture = stage.spec.mixture
        assert mixture is not None
        self.mixture = mixture
        self.stage, self.grid, self.device, self.rate = stage, grid, device, rate
        self.values = torch.zeros(len(mixture.layers), mixture.count, device=device)

    def move(self) -> None:
        """Updates the biases after a step (collective if the rate is not 0)."""
        if self.rate == 0:
            return
        counts = expert_counts(self.stage, self.grid, self.device)
        total = counts.sum(dim=1, keepdim=True)
        # The sign of mean - count, in integers.
        self.values += self.rate * (total - counts * counts.shape[1]).sign()
        self._give()

    @property
    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        values: list[list[float]] = self.values.tolist()
        return {ROUTER_BIAS: values} if any(any(row) for row in values) else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the biases from a checkpoint's state; zero if it has none."""
        values = bias_of(state, self.mixture)
        if values is None:
            self.values.zero_()
        else:
            self.values.copy_(values)
        self._give()

    def _give(self) -> None:
        for layer, router in self.stage.routers.items():
            router.bias.copy_(self.values[self.mixture.layers.index(layer)])
