"""The loss of a model on samples, on any layout: every sample once, weighted by its tokens.

Hidden states pass through the stages as in training. Sums are fp64, so that their order hardly matters.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.data.progress import counted
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.loss import IGNORED
from megalite.parallel.rows import Rows
from megalite.pipeline.forwards import Forwards
from megalite.training.batches import LazyMicroBatches, SampleSource


@dataclass(frozen=True)
class Score:
    """loss: mean over tokens (for a classifier over texts), in nats. tokens: those that counted. counts [N²]: a
    classifier's flattened confusion matrix; rows are labels of texts, columns are answers."""

    loss: float
    tokens: int
    counts: tuple[float, ...] = ()


@torch.inference_mode()
def evaluate(
    stage: Stage,
    grid: Grid,
    samples: SampleSource,
    count: int,
    sequence_length: int,
    micro: int = 8,
    by_heads: bool = False,
    source: int = 0,
) -> Score:
    """The score of the first `count` samples, the same on every rank (collective over the world).

    micro: samples that a data rank passes through the stages together. by_heads: as in Rows. source: as in Unread.
    """
    stage.eval()
    weight = next(stage.parameters())
    axis, data = grid.pipe, grid.data
    rows = Rows.along(grid.context, sequence_length, by_heads)
    micro = min(micro, -(-count // data.size))
    # Sum of losses, number of tokens, and a classifier's counts.
    numbers_summed = 2 + len(stage.spec.labels) ** 2
    sums = torch.zeros(numbers_summed, dtype=torch.float64, device=weight.device)
    batches = LazyMicroBatches(
        samples, 0, count, micro, data, weight.device, rows=rows, source=source
    )
    numbers = range(len(batches))

    def forward(number: int, hidden: Tensor | None) -> Tensor:
        tokens, labels, context = batches[number]
        output = stage(
            tokens if hidden is None else hidden, labels if axis.is_last else None, context
        )
        if axis.is_last:
            scores, counted = output.double().reshape(-1), (labels != IGNORED).sum().double()
            sums.add_(torch.cat([scores[:1], counted.reshape(1), scores[1:]]))
        return output

    shape = stage.hidden_shape(micro, sequence_length)
    reported = counted(numbers, len(numbers), "micro-batches evaluated", grid.rank == 0)
    Forwards(axis, weight.dtype, weight.device).run(reported, forward, lambda number: shape)
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= grid.tensor.size  # every rank of the tensor axis has the same sum
    loss, tokens, *counts = sums.tolist()
    return Score(loss / tokens if tokens else math.nan, round(tokens), tuple(counts))
