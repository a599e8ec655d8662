"""The loss of a training run's model on samples, through the pipeline of its engine. Without an engine:
inference/evaluate.py."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch
from megalite.training.step import tokens_that_count


def loss_and_tokens(pipeline: Pipeline, batches: Sequence[MicroBatch]) -> Tensor:
    """[sum of losses, tokens that count] of all ranks' micro-batches, fp64, on the CPU (collective); of a classifier
    its counts after them."""
    engine = pipeline.engine
    engine.eval()
    scores = pipeline.evaluate(batches).double().reshape(-1)
    engine.train()
    # Every rank of the tensor axis has the same sum, and the ranks without a head have none.
    counts = engine.grid.tensor.is_first and engine.stage.head is not None
    tokens = tokens_that_count(batches).double().reshape(1)
    result = torch.cat([scores[:1], tokens, scores[1:]]) * float(counts)
    dist.all_reduce(result)
    return result.cpu()
