"""One optimizer step on a global batch: the loss is a mean over all tokens that count, on whatever rank."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalite.parallel.collectives import max_over, sum_over
from megalite.parallel.grid import Axis
from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch


def tokens_that_count(batches: Sequence[MicroBatch]) -> Tensor:
    """The number of labels in these micro-batches that count, an int64 scalar."""
    return torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()


def samples_that_count(batches: Sequence[MicroBatch], context: Axis) -> Tensor:
    """1 for samples with a label that counts on any rank of the context axis, otherwise 0: fp32 [micro-batches, B].
    Those without one are padding of a micro-batch, or equivalent to it."""
    found = torch.stack([(batch.labels != IGNORED).any(dim=1) for batch in batches]).float()
    return max_over(found, context)


def train_step(
    pipeline: Pipeline,
    replica: Axis,
    batches: Sequence[MicroBatch],
    before_update: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs forwards, backwards and the update (collective). Returns this rank's sum of losses, 0 except on the rank
    with the head, and the number of tokens that count in the global batch (int64 scalar), both on the device: the host
    does not wait. before_update: called when all gradients are complete, with this rank's part of the mean loss (fp64
    scalar)."""
    grid, routes = pipeline.engine.grid, pipeline.engine.stage.spec.mixture is not None
    counts, each = tokens_that_count(batches).unsqueeze(0), None
    if routes:
        each = samples_that_count(batches, grid.context)
        counts = torch.cat([counts, each.sum().long().unsqueeze(0)])
    tokens, *samples = sum_over(counts, replica).clamp(min=1).unbind()
    if each is not None:
        # The mean over samples, all of which every rank of the context axis has counted.
        factor = pipeline.engine.current_loss_scale * replica.size * grid.context.size
        for batch, own in zip(batches, each * (factor / samples[0]), strict=True):
            batch.context.balance = own
        for router in pipeline.engine.stage.routers.values():
            router.tally.zero_()
    # DeepSpeed averages over the copies of the model; ours is a mean over tokens.
    scale = (replica.size / tokens.double()).float()
    ready = (
        None if before_update is None else lambda: before_update(pipeline.loss.double() / tokens)
    )
    loss = pipeline.train_step(batches, scale, ready)
    if routes and pipeline.engine.global_norm.accepted:
        pipeline.engine.router_bias.move()
    return loss, tokens
