"""The training loop: steps, evaluations, checkpoints, until the last step or a signal.

Besides weights and moments, the state of a run is its position, a value (position.py). One message before the update
tells every rank whether the step is sound (health.py), about signals, and about the end of a background save.
Everything else around a step is done by watchers (watchers.py). Next: pretraining.py, the command line.
"""

import contextlib
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.appended import Appended
from megalite.config import Config
from megalite.data.loader import TrainData, ValidData
from megalite.data.position import Position
from megalite.engine.build import LearningRate, build_pipeline
from megalite.engine.engine import Engine
from megalite.errors import MegaliteError
from megalite.guard.health import FAULTS, Health
from megalite.guard.watchdog import Watchdog
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.parallel.timeline import RANK_TIMELINE
from megalite.plan.states import peak_bytes, peak_line
from megalite.ranks.signals import EXIT_BASE, RESUME, listen
from megalite.report.read import STOPPED_BY_ERROR
from megalite.training.batches import MicroBatch, Prefetcher, step_batches
from megalite.training.checkpointing import Checkpoints
from megalite.training.evaluation import Validation
from megalite.training.step import train_step
from megalite.training.watchers import Row, Watcher
from megalite.training.watching import watchers_of

_SHOWN_CHARACTERS = 300  # characters of an error's text in the history


@dataclass
class Agreed:
    """What all ranks agree on at the end of a step."""

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
        self.config, self.spec, self.engine, self.position = config, spec, engine, start
        self.grid: Grid = engine.grid
        self.device = torch.device(engine.device or "cpu")
        self.pipeline = build_pipeline(engine, config, spec)
        self.watchdog = watchdog
        watchdog.instruction = lambda: self.pipeline.instruction
        watchdog.waits_for = lambda: self.pipeline.waits_for
        self.rate = LearningRate(engine, config)
        self.rate.start_at(start.step)
        self.watchers: list[Watcher] = []
        faults, run_dir = config.train.faults, Path(config.train.run_dir)
        self.faults_file = Appended(run_dir / FAULTS, self.note)
        self.health = Health(faults, engine, self.pipeline, watchdog.hosts, self.faults_file, start)
        self.rewinding, self.last_batch = False, range(0)
        check = False  # one rank per node has checked the data before the ranks started
        self.data = TrainData(config.data, config.train.seed, spec.vocabulary_size, check)
        self.validation: Validation | None = None
        if config.data.valid:
            valid = ValidData(config.data, spec.vocabulary_size, check)
            self.validation = Validation(config, valid, self.pipeline, self.note)
        self.checkpoints = Checkpoints(config, model, engine, self.health, start, self.note)
        self.saver = self.checkpoints.saver
        self.ahead = Prefetcher(self._read, self.device)
        engine.global_norm.riders = self._flags
        self.signals = listen()
        self.first_step = start.step
        self.watchers += watchers_of(self)

    def train(self) -> int:
        """Trains until the last step or a signal; returns the exit code. Raises TrainingError if it cannot continue."""
        reason = STOPPED_BY_ERROR
        try:
            stop = self._train()
            reason = "stopped early" if self.stops_early else "done"
            reason = f"signal {stop}" if stop else reason
            return EXIT_BASE + stop if stop else 0
        except MegaliteError as error:
            self._finish_earlier()
            reason += str(error)
            raise
        except BaseException as error:
            said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
            reason += ": ".join(filter(None, [type(error).__name__, said]))
            raise
        finally:
            self.ahead.close()
            self.faults_file.close()
            for watcher in self.watchers:
                watcher.ended(self.position, reason)
            for watcher in self.watchers:
                watcher.close()

    def _finish_earlier(self) -> None:
        """Completes a save in progress when the run fails with one of megalite's errors: the earlier checkpoint is
        still good. It has its own time limit, not the step's. If only one rank fails, for example by a token beyond the
        vocabulary, the other ranks' threads still write their parts."""
        seconds = self.config.train.limits.checkpoint_seconds
        in_time = self.watchdog.watching("the checkpoint before the fault", seconds)
        with in_time, contextlib.suppress(dist.DistError):  # must not replace the fault itself
            self.checkpoints.finish()

    def _train(self) -> int:
        """The number of the signal that stopped the run; 0: none did."""
        train, stop, first = self.config.train, 0, self.first_step
        limits, watching = train.limits, self.watchdog.watching
        self.signals.defer()
        for line in self.data.notes:
            self.note(line)
        if self.health.rewinds and self.position.step == 0:
            self._save()  # a run that may rewind needs a checkpoint
        self._make_up_evaluation()
        while self.position.step < train.last_step and not (stop or self.stops_early):
            step = self.position.step + 1
            with watching(
                f"step {step}",
                limits.first_step_seconds if step == 1 + first else limits.step_seconds,
            ):
                agreed = self._step()
            stop = agreed.stop
            if not self.rewinding:
                if self.config.evaluates and due(step, train.eval_interval, train.last_step):
                    if stop:  # there may be no time: the next start does it
                        self.position = replace(self.position, owes_evaluation=True)
                    else:
                        self._evaluate()
                wanted = agreed.save or stop or self.stops_early or self._is_best
                if wanted or due(step, train.checkpoint_interval, train.last_step):
                    with watching(f"checkpoint of step {step}", limits.checkpoint_seconds):
                        self._save()
            if self.rewinding:
                with watching(f"rewinding from step {step}", limits.checkpoint_seconds):
                    self._rewind()
                self._make_up_evaluation()
        with watching("the last checkpoint", limits.checkpoint_seconds):
            self.checkpoints.finish(last=True)
        for line in self.data.share_lines(self.position.consumed_samples):
            self.note(line)
        if stop:
            self.note(f"stopped by signal {stop} after step {self.position.step}: {RESUME}")
        elif self.stops_early:
            self.note(f"step {self.position.step}: {self.position.best.stop_line}")
        return stop

    @property
    def stops_early(self) -> bool:
        """Whether early stopping ends the run here. All ranks agree: an all-reduced tensor is bitwise identical on all
        of them."""
        return self.position.best.is_stopped(self.config.train.early_stop)

    @property
    def _is_best(self) -> bool:
        """Whether a checkpoint of this step would be the best so far, in a run that keeps the best."""
        position = self.position
        return self.config.train.keep_best and position.best.step == position.step

    def note(self, text: str) -> None:
        """Passes a line for the log to the watchers."""
        for watcher in self.watchers:
            watcher.note(text)

    def _step(self) -> Agreed:
        """Runs one optimizer step."""
        config, health, before = self.config, self.health, self.position
        count = config.batch_plan.size(before.consumed_samples)
        step_tokens = count * config.data.sequence_length
        for watcher in self.watchers:
            watcher.before_step(before)
        rate = self.rate.set(before)
        following = (
            before.after(count, step_tokens) if before.step + 1 < config.train.last_step else None
        )
        with RANK_TIMELINE.span("data", "wait for the batch"):
            batches = self.ahead.take(before, following)
        first = before.step == self.first_step
        health.begin(before)
        with self.engine.weighed() if first else contextlib.nullcontext({}) as memory:
            train_step(self.pipeline, self.grid.replica, batches, health.take_loss)
        agreed = self._agreed()
        if agreed.save_ended:
            self.checkpoints.finish()
        self.position = health.after(count, step_tokens)
        row: Row = {
            "step": self.position.step,
            "loss": health.loss,
            "grad_norm": health.norm,
            "learning_rate": rate,
            "consumed_samples": self.position.consumed_samples,
            "consumed_tokens": self.position.consumed_tokens,
        } | health.row()
        self.last_batch = range(before.consumed_samples, before.consumed_samples + count)
        self._heed(health.answer(self.position.step))
        if first:
            row |= self._memory_row(memory | {"peak_bytes": peak_bytes(self.device)})
            self.note(peak_line(row["peak_bytes"]))
        for watcher in self.watchers:
            watcher.after_step(row)
        return agreed

    def _heed(self, line: str | None) -> None:
        """Logs health's answer, and remembers if it asks for a rewind."""
        if line is not None:
            self.note(line)
            self.rewinding = self.health.fault is not None and self.health.fault.action == "rewind"

    def _rewind(self) -> None:
        """Rewinds to the newest good checkpoint in this process; the last batch is permanently excluded from the run
        (collective)."""
        left_out = self.position.leaving_out(self.last_batch).left_out
        self.position = replace(self.checkpoints.restore().position, left_out=left_out)
        self.rate.start_at(self.position.step)
        for watcher in self.watchers:
            watcher.went_back(self.position)
        ranges = ", ".join(f"{start} to {stop - 1}" for start, stop in left_out)
        self.note(f"rewound to step {self.position.step}; the run skips samples {ranges}")
        # Saved at once, so that a restart skips them too.
        self.rewinding = False
        self._save(again=True)
        self.checkpoints.finish()

    def _read(self, position: Position) -> list[MicroBatch]:
        """Reads this rank's micro-batches of the step that starts at a position, into main memory."""
        return step_batches(self.config, self.data, self.grid, position, torch.device("cpu"))

    def _flags(self) -> list[float]:
        """This rank's flags for the step's message to all ranks."""
        signals = self.signals
        flags = [
            signals.stop == signal.SIGTERM,
            signals.stop == signal.SIGINT,
            signals.save,
            self.saver.has_ended,
        ]
        # A flag that is set after this line counts at the end of the next step.
        signals.save = signals.save and not flags[2]
        return [float(flag) for flag in flags]

    def _agreed(self) -> Agreed:
        """The flags of all ranks, from the step's message."""
        term, interrupt, save, ended = self.engine.global_norm.heard
        stop = signal.SIGTERM if term else signal.SIGINT if interrupt else 0
        return Agreed(stop, bool(save), ended == self.grid.world_size)

    def _memory_row(self, memory: dict[str, int]) -> dict[str, list[int]]:
        """Bytes of model states, and the peak, by rank (collective)."""
        everyone: list[dict[str, int]] = [{}] * self.grid.world_size
        dist.all_gather_object(everyone, memory)
        return {name: [of_rank[name] for of_rank in everyone] for name in sorted(memory)}

    def _make_up_evaluation(self) -> None:
        """Runs the evaluation that a checkpoint owes because a signal came before it. The checkpoint is then written
        again with the result, so that no later start repeats it (collective)."""
        if not self.position.owes_evaluation:
            return
        self.position = replace(self.position, owes_evaluation=False)
        if self.config.evaluates:
            self._evaluate()
            step, seconds = self.position.step, self.config.train.limits.checkpoint_seconds
            with self.watchdog.watching(f"checkpoint of step {step}", seconds):
                self._save(again=True)

    def _evaluate(self) -> None:
        """Computes the validation loss, if there is data for it, and lets watchers add to its row (collective)."""
        step, seconds = self.position.step, self.config.train.limits.evaluation_seconds
        with self.watchdog.watching(f"evaluation after step {step}", seconds):
            self._evaluate_in_time()

    def _evaluate_in_time(self) -> None:
        row: Row = {"step": self.position.step}
        if self.validation is not None:
            row |= self.validation.row()
            early, position = self.config.train.early_stop, self.position
            delta = early.min_delta if early is not None else 0.0
            best = position.best.after(row["valid_loss"], position.step, delta)
            self.position = replace(position, best=best)
        for watcher in self.watchers:
            watcher.evaluated(row)

    def _save(self, again: bool = False) -> None:
        """Starts saving a checkpoint of the position, unless its step is already saved or it is not sound. again:
        replace the saved one."""
        saved = not again and self.checkpoints.saved_step == self.position.step
        unsound = self.checkpoints.save(self.position, again)
        self._heed(unsound)
        if unsound is None and not saved:
            for watcher in self.watchers:
                watcher.saved(self.position)


def due(step: int, interval: int, last: int) -> bool:
    """Whether something is due after `step` that happens every `interval` steps (0: never) and at the last step."""
    return step == last or (interval > 0 and step % interval == 0)
