"""The loss of a training run's model on samples, computed by the pipeline of its engine. Without an engine:
inference/evaluate.py."""

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import MicroBatch, MicroBatches


def loss_and_tokens(pipeline: Pipeline, batches: MicroBatches) -> Tensor:
    """[sum of losses, tokens that count] over all ranks' micro-batches, fp64, on the CPU (collective); for a classifier
    its counts follow. Each micro-batch is read once, when the pipeline reaches it, so that even a long evaluation
    holds only those in flight through this rank's chunks."""
    engine = pipeline.engine
    tokens = torch.zeros((), dtype=torch.int64, device=engine.device)

    def read(number: int) -> MicroBatch:
        batch = batches[number]
        tokens.add_((batch.labels != IGNORED).sum())  # on the device: the host does not wait
        return batch

    engine.eval()
    scores = pipeline.evaluate(len(batches), read).double().reshape(-1)
    engine.train()
    # Every rank of the tensor axis has the same sum, and the ranks without a head have none.
    counts = engine.grid.tensor.is_first and engine.stage.head is not None
    result = torch.cat([scores[:1], tokens.double().reshape(1), scores[1:]]) * float(counts)
    dist.all_reduce(result)
    return result.cpu()
