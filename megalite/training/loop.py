"""The run: steps, evaluations, checkpoints, until the last step or a signal.

The whole position of a run is a value, `Position`, beside weights and moments. One message at a step's end carries
what all ranks must agree on: the loss, signals, the end of a background save. Next: program.py, the command line.
"""

import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megalite.checkpoint.save import Saver, failure_line, owned_boxes
from megalite.config import Config
from megalite.data.loader import TrainData, ValidData
from megalite.errors import TrainingError
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.parallel.zero import Engine
from megalite.signals import EXIT_BASE, listen
from megalite.training.batches import MicroBatch, Samples, micro_batches
from megalite.training.engine import DTYPES, LearningRate, build_pipeline
from megalite.training.metrics import MetricsFile
from megalite.training.progress import Screen, matrix_product_rate
from megalite.training.step import tokens_that_count, train_step
from megalite.training.watchdog import Watchdog


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, samples and tokens seen."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after(self, samples: int, tokens: int) -> "Position":
        """One step later."""
        return Position(self.step + 1, self.consumed_samples + samples, self.consumed_tokens + tokens)


@dataclass
class Agreed:
    """What the ranks know together at a step's end. loss_sum in nats, over the global batch."""

    loss_sum: float
    stop: int
    save: bool
    save_ended: bool


class Run:
    """A training run on this rank: every rank makes one and calls `train`."""

    def __init__(
        self,
        config: Config,
        spec: TransformerSpec,
        model: dict[str, Any],
        engine: Engine,
        start: Position,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.spec, self.model, self.engine, self.position = config, spec, model, engine, start
        self.grid: Grid = engine.grid
        self.device = torch.device(engine.device or "cpu")
        self.pipeline = build_pipeline(engine, config, spec)
        self.watchdog = watchdog
        watchdog.instruction = lambda: self.pipeline.instruction
        self.rate = LearningRate(engine, config)
        self.rate.start_at(start.step)
        check = False  # one rank a node has, before the ranks started
        self.data = TrainData(config.data, config.train.seed, spec.vocabulary_size, check)
        self.valid = ValidData(config.data, spec.vocabulary_size, check) if config.data.valid else None
        run_dir = Path(config.train.run_dir)
        self.saver = Saver(run_dir, config.train.keep_checkpoints)
        self.saved_step = start.step
        self.signals = listen()
        length = config.data.sequence_length
        self.step_tokens = config.train_batch_size * length
        machine_rate = matrix_product_rate(self.device, DTYPES[config.precision])
        self.metrics: MetricsFile | None = None
        self.screen: Screen | None = None
        if self.grid.rank == 0:
            self.metrics = MetricsFile(run_dir, start.step, config.train.tensorboard)
            self.screen = Screen(
                config.train.steps, start.step, config.train.log_interval, spec.flops_per_token(length), machine_rate
            )
        self.first_step = start.step

    def train(self) -> int:
        """Runs to the last step or to a signal; the exit code."""
        train, stop, first = self.config.train, 0, self.first_step
        limits, watching = train.limits, self.watchdog.watching
        self.signals.defer()
        for line in self.data.notes:
            self.note(line)
        while self.position.step < train.steps and not stop:
            step = self.position.step + 1
            with watching(f"step {step}", limits.first_step_seconds if step == 1 + first else limits.step_seconds):
                agreed = self._step()
            stop = agreed.stop
            if agreed.save_ended:
                self._finish_save()
            if self.valid is not None and not stop and due(step, train.eval_interval, train.steps):
                with watching(f"evaluation after step {step}", limits.evaluation_seconds):
                    self._evaluate(self.valid)
            if agreed.save or stop or due(step, train.checkpoint_interval, train.steps):
                with watching(f"checkpoint of step {step}", limits.checkpoint_seconds):
                    self._save()
        with watching("the last checkpoint", limits.checkpoint_seconds):
            self._finish_save(last=True)
        for line in self.data.share_lines(self.position.consumed_samples):
            self.note(line)
        if self.screen is not None and self.metrics is not None:
            self.screen.close()
            self.metrics.close()
        if stop:
            self.note(f"stopped by signal {stop} after step {self.position.step}")
        return EXIT_BASE + stop if stop else 0

    def note(self, text: str) -> None:
        """A line on rank 0."""
        if self.screen is not None:
            self.screen.note(text)

    def _step(self) -> Agreed:
        """One optimizer step."""
        start = time.perf_counter()
        config, grid, engine = self.config, self.grid, self.engine
        rate = self.rate.set(self.position.step)
        draw = (config.train.seed, self.position.step)
        batches = self._batches(self.data, self.position.consumed_samples, config.train_batch_size, draw)
        memory: dict[str, int] = {}
        first = self.position.step == self.first_step
        measure = (lambda: memory.update(engine.state_bytes())) if first else None
        total, weight = train_step(self.pipeline, grid.data, batches, measure)
        agreed = self._agree(total)
        self.position = self.position.after(config.train_batch_size, self.step_tokens)
        norm = engine.get_global_grad_norm()
        row = {
            "step": self.position.step,
            "loss": agreed.loss_sum / weight,
            "grad_norm": float(norm) if norm is not None else math.nan,
            "learning_rate": rate,
            "consumed_samples": self.position.consumed_samples,
            "consumed_tokens": self.position.consumed_tokens,
        }
        self._check_finite(row)
        if first:
            row |= self._memory_row(memory | {"optimizer_bytes": engine.state_bytes()["optimizer_bytes"]})
        self._report(row, time.perf_counter() - start)
        return agreed

    def _batches(
        self, samples: Samples, start: int, count: int, draw: tuple[int, int] | None = None
    ) -> list[MicroBatch]:
        return micro_batches(
            samples, start, count, self.config.micro_batch_size, self.grid.data, self.device, draw
        )

    def _agree(self, loss_sum: torch.Tensor) -> Agreed:
        """One all-reduce over the world."""
        counts = self.grid.tensor.is_first  # its ranks have the same loss
        signals = self.signals
        flags = [
            signals.stop == signal.SIGTERM, signals.stop == signal.SIGINT, signals.save, self.saver.has_ended
        ]
        own = torch.tensor([0.0, *flags], dtype=torch.float64, device=loss_sum.device)
        if counts:
            own[0] = loss_sum
        # A flag that came after this line counts at the next step's end.
        signals.save = signals.save and not flags[2]
        dist.all_reduce(own)
        loss, term, interrupt, save, ended = own.tolist()
        stop = signal.SIGTERM if term else signal.SIGINT if interrupt else 0
        return Agreed(loss, stop, bool(save), ended == self.grid.world_size)

    def _check_finite(self, row: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise TrainingError(
                    f"step {row['step']}: {name} is {row[name]}: must be finite; nothing of this step is saved"
                )

    def _memory_row(self, memory: dict[str, int]) -> dict[str, list[int]]:
        """Bytes of model states by rank (collective)."""
        everyone: list[dict[str, int]] = [{}] * self.grid.world_size
        dist.all_gather_object(everyone, memory)
        return {name: [of_rank[name] for of_rank in everyone] for name in sorted(memory)}

    def _report(self, row: dict[str, Any], seconds: float) -> None:
        row |= {"step_seconds": seconds, "tokens_per_second": self.step_tokens / seconds}
        if self.saver.blocked_seconds:
            row["checkpoint_seconds"], self.saver.blocked_seconds = self.saver.blocked_seconds, 0.0
        if self.metrics is not None and self.screen is not None:
            self.metrics.write(row)
            self.screen.step(row)

    def _evaluate(self, valid: ValidData) -> None:
        """Loss over the first windows of each validation corpus, shared out by their weights."""
        config = self.config
        wanted = config.train.eval_steps * config.train_batch_size
        weights = [source.weight for source in config.data.valid]
        losses: dict[str, float] = {}
        sums = torch.zeros(2, dtype=torch.float64)
        for (path, positions), weight in zip(valid.corpora, weights, strict=True):
            count = min(len(positions), max(1, round(wanted * weight / sum(weights))))
            if count == 0:
                continue
            part = self._loss_and_tokens(valid, positions.start, count)
            sums += part
            losses[path] = (part[0] / part[1].clamp(min=1)).item()
        loss = (sums[0] / sums[1].clamp(min=1)).item()
        row: dict[str, Any] = {"step": self.position.step, "valid_loss": loss, "valid_perplexity": math.exp(loss)}
        if len(losses) > 1:
            row["valid_losses"] = losses
        self.note(f"step {self.position.step}  valid loss {loss:.4f}  perplexity {math.exp(loss):.2f}")
        if self.metrics is not None:
            self.metrics.write(row)

    def _loss_and_tokens(self, samples: Samples, start: int, count: int) -> torch.Tensor:
        """[sum of losses, tokens] over samples, fp64, on the CPU (collective)."""
        batches = self._batches(samples, start, count)
        self.engine.eval()
        loss = self.pipeline.evaluate(batches)
        self.engine.train()
        counts = self.grid.tensor.is_first and self.grid.pipe.is_last
        result = torch.stack([loss.double(), tokens_that_count(batches).double()]) * float(counts)
        dist.all_reduce(result)
        return result.cpu()

    def _save(self) -> None:
        if self.saved_step == self.position.step:
            return
        self._finish_save()
        config, grid = self.config, self.grid
        state = {
            **asdict(self.position),
            "seed": config.train.seed,
            "sequence_length": config.data.sequence_length,
            "tokenizer": config.data.tokenizer,
            "model": self.model,
            "layout": {
                "pipe": grid.pipe.size,
                "data": grid.data.size,
                "tensor": grid.tensor.size,
                "zero_stage": config.zero_stage,
                "precision": config.precision,
            },
        }
        boxes = owned_boxes(self.engine.shards(), grid.data, replicated=config.zero_stage == 0)
        self.saver.save(self.position.step, boxes, state)
        self.saved_step = self.position.step

    def _finish_save(self, last: bool = False) -> None:
        """Waits for a save that is going on. One that failed is told of; the run goes on with the older ones,
        unless it was the last."""
        try:
            self.saver.wait()
        except CheckpointException as error:
            line = f"checkpoint of step {self.saved_step} could not be saved: {failure_line(error)}"
            if last:
                raise TrainingError(line) from None
            self.note(line)


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps (0: never), and at the last one, does after `step`."""
    return step == last or (interval > 0 and step % interval == 0)
