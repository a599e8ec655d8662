"""One optimizer step on a global batch: the loss is a mean over the tokens that count, wherever they are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalite.parallel.collectives import sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch


def tokens_that_count(batches: Sequence[MicroBatch]) -> Tensor:
    """Labels of these micro-batches that count, an int64 scalar."""
    return torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()


def train_step(
    pipeline: Pipeline,
    replica: Axis,
    batches: Sequence[MicroBatch],
    before_update: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forwards, backwards and the update (collective): this rank's sum of losses, 0 but on the rank with the head, and
    the tokens that count in the global batch (int64 scalar), both on the device: the host waits for neither.
    before_update: called when all gradients are there, with this rank's part of the mean loss (fp64 scalar)."""
    tokens = sum_over(tokens_that_count(batches), replica).clamp(min=1)
    # DeepSpeed averages over the copies of the model; ours is a mean over tokens.
    scale = (replica.size / tokens.double()).float()
    ready = (
        None if before_update is None else lambda: before_update(pipeline.loss.double() / tokens)
    )
    return pipeline.train_step(batches, scale, ready), tokens
