"""The loss of a model on samples, on any layout: every sample once, weighted by its tokens.

Stages pass hidden states on as in training; sums are kept in fp64, so that the order hardly matters.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.loss import IGNORED
from megalite.parallel.pipeline import Boundary
from megalite.training.batches import Samples, micro_batches


@dataclass(frozen=True)
class Score:
    """loss: mean over tokens, in nats; tokens: those that counted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite beyond a float's range."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.inference_mode()
def evaluate(
    stage: Stage, grid: Grid, samples: Samples, count: int, sequence_length: int, micro: int = 8
) -> Score:
    """The score of the first `count` samples, the same on every rank (collective over the world).

    micro: samples that a data rank passes through the stages together.
    """
    stage.eval()
    weight = next(stage.parameters())
    axis, data = grid.pipe, grid.data
    micro = min(micro, -(-count // data.size))
    shape = (micro, sequence_length, stage.spec.hidden_size)
    boundary = Boundary(axis, shape, weight.dtype, weight.device)
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)  # of losses, of tokens
    for first in range(0, count, micro * data.size):
        part = min(micro * data.size, count - first)
        # A few samples at a time: a corpus is read as it is needed.
        for tokens, labels, context in micro_batches(samples, first, part, micro, data, weight.device):
            source = tokens if axis.is_first else boundary.receive(axis.rank - 1)
            output = stage(source, labels if axis.is_last else None, context)
            if axis.is_last:
                sums += torch.stack([output.double(), (labels != IGNORED).sum().double()])
            else:
                boundary.send(output, axis.rank + 1)
    boundary.finish()
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= grid.tensor.size  # every rank of the tensor axis has the same sum
    loss, tokens = sums.tolist()
    return Score(loss / tokens if tokens else math.nan, round(tokens))
