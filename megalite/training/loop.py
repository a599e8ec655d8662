"""The run: steps, evaluations, checkpoints, until the last step or a signal.

The whole position of a run is a value (position.py), beside weights and moments. One message before the update tells
every rank whether the step is sound (health.py), of signals, and of the end of a background save. Next: program.py, the
command line.
"""

import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megalite.checkpoint.appended import Appended
from megalite.checkpoint.save import Saver, failure_line, owned_boxes
from megalite.config import Config
from megalite.data.loader import TrainData, ValidData
from megalite.data.position import Kept, Position
from megalite.engine.build import DTYPES, LearningRate, build_pipeline
from megalite.engine.engine import Engine
from megalite.errors import TrainingError
from megalite.guard.health import FAULTS, Health
from megalite.guard.pace import Pace
from megalite.guard.replicas import Replicas
from megalite.guard.watchdog import Watchdog
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.plan.states import peak_bytes, peak_line
from megalite.ranks.signals import EXIT_BASE, RESUME, listen
from megalite.training.ahead import Ahead
from megalite.training.batches import MicroBatch, Samples, micro_batches
from megalite.training.evaluation import loss_and_tokens
from megalite.training.fingerprint import fingerprint
from megalite.training.metrics import MetricsFile, perplexity
from megalite.training.mfu import Utilisation, peak_flops
from megalite.training.screen import Screen
from megalite.training.start import starting_point
from megalite.training.step import train_step

READ_BY = {"samples", "loss", "objective", "reset_attention", "eod_mask_loss"}
"""Keys of `megalite.data` that tell how a corpus is read."""


@dataclass
class Agreed:
    """What the ranks know together at a step's end."""

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
        self.config, self.spec, self.model, self.engine, self.position = (
            config,
            spec,
            model,
            engine,
            start,
        )
        self.grid: Grid = engine.grid
        self.device = torch.device(engine.device or "cpu")
        self.pipeline = build_pipeline(engine, config, spec)
        self.watchdog = watchdog
        watchdog.instruction = lambda: self.pipeline.instruction
        watchdog.waits_for = lambda: self.pipeline.waits_for
        self.rate = LearningRate(engine, config)
        self.rate.start_at(start.step)
        faults, run_dir = config.train.faults, Path(config.train.run_dir)
        self.faults_file = Appended(run_dir / FAULTS, self.note)
        self.health = Health(faults, engine, self.pipeline, watchdog.hosts, self.faults_file)
        self.pace = Pace(faults, engine, spec, config.data.counted_share, watchdog.hosts)
        self.replicas = Replicas(engine.stage)
        self.going_back, self.last_batch = False, range(0)
        check = False  # one rank a node has, before the ranks started
        self.data = TrainData(config.data, config.train.seed, spec.vocabulary_size, check)
        evaluates = config.data.valid and config.train.eval_interval > 0
        self.valid = ValidData(config.data, spec.vocabulary_size, check) if evaluates else None
        copy_gib = config.train.checkpoint_copy_gib
        copy_bytes = None if copy_gib is None else int(copy_gib * 2**30)
        timeout = config.train.limits.collective_timeout
        self.saver = Saver(run_dir, config.train.keep_checkpoints, copy_bytes, timeout)
        self.ahead = Ahead(self._read, self.device)
        engine.global_norm.riders = self._flags
        self.saved_step = start.step or None  # that of step 0 is made anew where one is wanted
        self.signals = listen()
        length = config.data.sequence_length
        peak = peak_flops(self.device, DTYPES[config.precision])
        flops_per_token = spec.flops_per_token(length, config.data.counted_share)
        self.utilisation = Utilisation(flops_per_token, peak, self.grid.world_size)
        self.metrics: MetricsFile | None = None
        self.screen: Screen | None = None
        self.fingerprint = (
            fingerprint(config) if self.grid.rank == 0 else {}
        )  # that rank writes state.json
        if self.grid.rank == 0:
            self.screen = Screen(config.train.steps, start.step, config.train.log_interval)
            self.metrics = MetricsFile(run_dir, start.step, config.train.tensorboard, self.note)
        self.first_step = start.step

    def train(self) -> int:
        """Runs to the last step or to a signal; the exit code. TrainingError where it cannot go on."""
        try:
            return self._train()
        except TrainingError:
            self._finish_save()  # one from before the fault is as good as it would have been
            raise
        finally:
            self.ahead.close()
            for file in (self.metrics, self.faults_file):
                if file is not None:
                    file.close()

    def _train(self) -> int:
        train, stop, first = self.config.train, 0, self.first_step
        limits, watching = train.limits, self.watchdog.watching
        self.signals.defer()
        for line in self.data.notes:
            self.note(line)
        if self.health.rewinds and self.position.step == 0:
            self._save()  # a run that may go back has something to go back to
        while self.position.step < train.steps and not stop:
            step = self.position.step + 1
            with watching(
                f"step {step}",
                limits.first_step_seconds if step == 1 + first else limits.step_seconds,
            ):
                agreed = self._step()
            stop = agreed.stop
            if not self.going_back:
                if (
                    self.valid is not None
                    and not stop
                    and due(step, train.eval_interval, train.steps)
                ):
                    with watching(f"evaluation after step {step}", limits.evaluation_seconds):
                        self._evaluate(self.valid)
                if agreed.save or stop or due(step, train.checkpoint_interval, train.steps):
                    with watching(f"checkpoint of step {step}", limits.checkpoint_seconds):
                        self._save()
            if self.going_back:
                with watching(f"going back from step {step}", limits.checkpoint_seconds):
                    self._go_back()
        with watching("the last checkpoint", limits.checkpoint_seconds):
            self._finish_save(last=True)
        for line in self.data.share_lines(self.position.consumed_samples):
            self.note(line)
        if self.screen is not None:
            self.screen.close()
        if stop:
            self.note(f"stopped by signal {stop} after step {self.position.step}: {RESUME}")
        return EXIT_BASE + stop if stop else 0

    def note(self, text: str) -> None:
        """A line on rank 0."""
        if self.screen is not None:
            self.screen.note(text)

    def _step(self) -> Agreed:
        """One optimizer step."""
        start = time.perf_counter()
        config, grid, engine, health = self.config, self.grid, self.engine, self.health
        before = self.position
        count = config.batch_plan.size(before.consumed_samples)
        step_tokens = count * config.data.sequence_length
        rate = self.rate.set(before)
        following = (
            before.after(count, step_tokens) if before.step + 1 < config.train.steps else None
        )
        batches = self.ahead.take(before, following)
        first = before.step == self.first_step
        health.begin(before)
        self.pace.begin(before.step + 1)
        with engine.weighed() if first else nullcontext({}) as memory:
            train_step(self.pipeline, grid.data, batches, health.take_loss)
        agreed = self._agreed()
        if agreed.save_ended:
            self._finish_save()
        self.position = health.after(count, step_tokens)
        row = {
            "step": self.position.step,
            "loss": health.loss,
            "grad_norm": health.norm,
            "learning_rate": rate,
            "consumed_samples": self.position.consumed_samples,
            "consumed_tokens": self.position.consumed_tokens,
        } | health.row()
        self.last_batch = range(before.consumed_samples, before.consumed_samples + count)
        self._heed(health.answer(self.position.step))
        self._compare_replicas()
        if first:
            row |= (
                bytes_by_rank := self._memory_row(memory | {"peak_bytes": peak_bytes(self.device)})
            )
            self.note(peak_line(bytes_by_rank["peak_bytes"]))
        figures, lines = self.pace.end(self.position.step)
        for line in lines:
            self.note(line)
        self._report(row | figures, step_tokens, time.perf_counter() - start)
        return agreed

    def _heed(self, line: str | None) -> None:
        """Of health's answer: tells it, and remembers where it asks to go back."""
        if line is not None:
            self.note(line)
            self.going_back = self.health.fault is not None and self.health.fault.action == "rewind"

    def _compare_replicas(self) -> None:
        """TrainingError where a rank holds another value of a weight than the ranks that should hold the same."""
        step, interval = self.position.step, self.config.train.faults.replica_check_interval
        if interval == 0 or step % interval or self.health.fault is not None:
            return
        if (found := self.replicas.difference(self.device)) is not None:
            since = f"a checkpoint of a step after {step - interval} may hold it"
            raise TrainingError(f"step {step}: {found.line(self.watchdog.hosts)}; {since}")

    def _go_back(self) -> None:
        """To the newest good checkpoint, in this process; the last batch stays out of the run for good (collective)."""
        self._finish_save()
        left_out = self.position.leaving_out(self.last_batch)
        start = starting_point(Path(self.config.train.run_dir), None)
        if start.weights is None:
            raise TrainingError(f"{self.config.train.run_dir}: holds no checkpoint to go back to")
        start.fill(self.engine)
        self.saver.starts_from(start.position.step, start.damaged)
        self.position = replace(start.position, left_out=left_out.left_out)
        self.rate.start_at(self.position.step)
        if self.metrics is not None:
            self.metrics.go_back(self.position.step)
        self.note(
            f"back at step {self.position.step}; the run leaves out samples {self._left_out()}"
        )
        # Written down at once, so that a restart leaves them out too.
        self.going_back, self.saved_step = False, None
        self._save()
        self._finish_save()

    def _left_out(self) -> str:
        return ", ".join(f"{start} to {stop - 1}" for start, stop in self.position.left_out)

    def _read(self, position: Position) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins at a position, in main memory."""
        config, start = self.config, position.consumed_samples
        samples, count = Kept(self.data, position), config.batch_plan.size(start)
        draw, cpu = (config.train.seed, position.step), torch.device("cpu")
        return micro_batches(
            samples, start, count, config.micro_batch_size, self.grid.data, cpu, draw
        )

    def _flags(self) -> list[float]:
        """What the other ranks must hear of this one."""
        signals = self.signals
        flags = [
            signals.stop == signal.SIGTERM,
            signals.stop == signal.SIGINT,
            signals.save,
            self.saver.has_ended,
        ]
        # A flag that came after this line counts at the next step's end.
        signals.save = signals.save and not flags[2]
        return [float(flag) for flag in flags]

    def _agreed(self) -> Agreed:
        """What the step's message has told of all ranks."""
        term, interrupt, save, ended = self.engine.global_norm.heard
        stop = signal.SIGTERM if term else signal.SIGINT if interrupt else 0
        return Agreed(stop, bool(save), ended == self.grid.world_size)

    def _memory_row(self, memory: dict[str, int]) -> dict[str, list[int]]:
        """Bytes of model states, and the peak, by rank (collective)."""
        everyone: list[dict[str, int]] = [{}] * self.grid.world_size
        dist.all_gather_object(everyone, memory)
        return {name: [of_rank[name] for of_rank in everyone] for name in sorted(memory)}

    def _report(self, row: dict[str, Any], tokens: int, seconds: float) -> None:
        rate = tokens / seconds
        row |= {"step_seconds": seconds, "tokens_per_second": rate, **self.utilisation.row(rate)}
        row |= self.saver.taken_figures()
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
        row: dict[str, Any] = {
            "step": self.position.step,
            "valid_loss": loss,
            "valid_perplexity": perplexity(loss),
        }
        if len(losses) > 1:
            row["valid_losses"] = losses
        self.note(
            f"step {self.position.step}  valid loss {loss:.4f}  perplexity {perplexity(loss):.5g}"
        )
        if self.metrics is not None:
            self.metrics.write(row)

    def _loss_and_tokens(self, samples: Samples, start: int, count: int) -> torch.Tensor:
        """[sum of losses, tokens] over samples, fp64, on the CPU (collective)."""
        batches = micro_batches(
            samples, start, count, self.config.micro_batch_size, self.grid.data, self.device
        )
        return loss_and_tokens(self.pipeline, batches)

    def _save(self) -> None:
        if self.saved_step == self.position.step:
            return
        self._finish_save()
        config, grid = self.config, self.grid
        boxes = owned_boxes(self.engine.shards(), grid.data, replicated=config.zero_stage == 0)
        self._heed(unsound := self.health.check_sound(boxes, self.position.step))
        if unsound is not None:
            return
        state = {
            **asdict(replace(self.position, loss_scale=self.engine.loss_scale_state())),
            "seed": config.train.seed,
            "optimizer": config.document.optimizer and config.document.optimizer.type,
            "sequence_length": config.data.sequence_length,
            "tokenizer": config.data.tokenizer,
            "data": config.data.model_dump(include=READ_BY),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "layout": {
                "pipe": grid.pipe.size,
                "data": grid.data.size,
                "tensor": grid.tensor.size,
                "zero_stage": config.zero_stage,
                "precision": config.precision,
            },
        }
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
        while self.saver.told:
            self.note(self.saver.told.pop(0))


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps (0: never), and at the last one, does after `step`."""
    return step == last or (interval > 0 and step % interval == 0)
