"""The loss of a training run's model on samples, through the pipeline of its engine. Without an engine:
inference/evaluate.py."""

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch, MicroBatches


def loss_and_tokens(pipeline: Pipeline, batches: MicroBatches) -> Tensor:
    """[sum of losses, tokens that count] of all ranks' micro-batches, fp64, on the CPU (collective); of a classifier
    its counts after them. Each micro-batch is asked for once, when the pipeline comes to it: of an evaluation as long
    as one likes, those that are on their way through this rank's chunks are held."""
    engine = pipeline.engine
    tokens = torch.zeros((), dtype=torch.int64, device=engine.device)

    def read(number: int) -> MicroBatch:
        batch = batches[number]
        tokens.add_((batch.labels != IGNORED).sum())  # the host waits for none of them
        return batch

    engine.eval()
    scores = pipeline.evaluate(len(batches), read).double().reshape(-1)
    engine.train()
    # Every rank of the tensor axis has the same sum, and the ranks without a head have none.
    counts = engine.grid.tensor.is_first and engine.stage.head is not None
    result = torch.cat([scores[:1], tokens.double().reshape(1), scores[1:]]) * float(counts)
    dist.all_reduce(result)
    return result.cpu()
