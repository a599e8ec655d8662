"""The evaluations of a training run, computed by the pipeline of its engine. Without an engine:
inference/evaluate.py."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import Config
from megalite.data.loader import ValidData
from megalite.parallel.loss import IGNORED
from megalite.pipeline.actions import Pipeline
from megalite.training.batches import (
    LazyMicroBatches,
    MicroBatch,
    MicroBatches,
    SampleSource,
    rows_of,
)
from megalite.training.classification import figures
from megalite.training.metrics import perplexity
from megalite.training.watchers import Row


class Validation:
    """The loss on the validation corpora. log: is called with a line for the log."""

    def __init__(
        self, config: Config, data: ValidData, pipeline: Pipeline, log: Callable[[str], None]
    ) -> None:
        self.config, self.data, self.pipeline, self.log = config, data, pipeline, log

    def row(self) -> Row:
        """The loss over the first samples of each corpus, in proportion to their weights, or over all samples, as a row
        of metrics; for a classifier also its figures (collective)."""
        labels = self.pipeline.engine.stage.spec.labels
        sums = torch.zeros(2 + len(labels) ** 2, dtype=torch.float64)
        losses: dict[str, float] = {}
        for name, positions in self._taken():
            part = self.scores(self.data, positions)
            sums += part
            losses[name] = (part[0] / part[1]).item()
        loss = (sums[0] / sums[1]).item()
        if sums[1] == 0:  # NaN never counts as an improvement
            self.log("validation: no token counts in the evaluated samples, so there is no loss")
        row: Row = {"valid_loss": loss, "valid_perplexity": perplexity(loss)}
        if len(losses) > 1:
            row["valid_losses"] = losses
        if labels and sums[1] > 0:
            found = figures(sums[2:].tolist(), labels)
            row |= {f"valid_{name}": value for name, value in found.items()}
        return row

    def _taken(self) -> list[tuple[str, range]]:
        """(name, positions of its samples) of each corpus that is evaluated."""
        steps, batch = self.config.train.eval_steps, self.config.train_batch_size
        weights = [source.weight for source in self.config.data.valid]
        paths = [path for path, _ in self.data.corpora]
        taken = []
        for number, (path, positions) in enumerate(self.data.corpora):
            share = len(positions)
            if steps != "all":
                share = max(1, round(steps * batch * weights[number] / sum(weights)))
            # Two parts of one corpus are distinguished by their index in megalite.data.valid.
            name = path if paths.count(path) == 1 else f"{path}:{number}"
            if len(positions) > 0:
                taken.append((name, positions[:share]))
        return taken

    def scores(self, samples: SampleSource, positions: range) -> Tensor:
        """[sum of losses, tokens that count], and a classifier's counts, of these samples (see loss_and_tokens)."""
        engine = self.pipeline.engine
        batches = LazyMicroBatches(
            samples,
            positions.start,
            len(positions),
            self.config.micro_batch_size,
            engine.grid.data,
            torch.device(engine.device or "cpu"),
            rows=rows_of(self.config, engine.grid),
            source=self.config.data.source_length,
        )
        return loss_and_tokens(self.pipeline, batches)


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
