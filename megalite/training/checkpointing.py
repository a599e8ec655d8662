"""A run's checkpoints: what is saved, when an earlier save is waited for, and restoring one. Next: loop.py."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megalite.checkpoint.save import Saver, failure_line, owned_boxes
from megalite.checkpoint.storage import SaveFailed
from megalite.config import Config
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.errors import TrainingError
from megalite.guard.health import Health
from megalite.training.fingerprint import fingerprint
from megalite.training.start import StartingPoint, starting_point
from megalite.training.watchers import Row, Watcher

READ_BY = {"samples", "loss", "objective", "reset_attention", "eod_mask_loss"}
"""Keys of `megalite.data` that determine how a corpus is read."""


class Checkpoints(Watcher):
    """The checkpoints of one run. Every rank makes one and must call it at the same steps. tell: takes lines for the
    log. model: the Hugging Face config as a dict."""

    def __init__(
        self,
        config: Config,
        model: dict[str, Any],
        engine: Engine,
        health: Health,
        start: Position,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.engine = config, model, engine
        self.health, self.tell = health, tell
        train = config.train
        self.run_dir = Path(train.run_dir)
        copy_gib = train.checkpoint_copy_gib
        copy_bytes = None if copy_gib is None else int(copy_gib * 2**30)
        timeout = train.limits.collective_timeout
        self.saver = Saver(self.run_dir, train.keep_checkpoints, copy_bytes, timeout)
        # A checkpoint of step 0 is written again if one is wanted.
        self.saved_step = start.step or None
        # Rank 0 writes state.json.
        self.fingerprint = fingerprint(config) if engine.grid.rank == 0 else {}

    def after_step(self, row: Row) -> None:
        """Adds the costs of checkpoints since the last step."""
        row |= self.saver.taken_figures()

    def save(self, position: Position, again: bool = False) -> str | None:
        """Starts a save (collective), unless that step is already saved. again: replace it. Returns None, or a line
        about a value that is not finite, so that nothing is saved. Raises TrainingError if the run must stop for
        that."""
        if self.saved_step == position.step and not again:
            return None
        self.finish()
        replicated = self.config.zero_stage == 0
        boxes = owned_boxes(self.engine.shards(), self.engine.grid, replicated)
        if (unsound := self.health.check_sound(boxes, position.step)) is not None:
            return unsound
        best = self.config.train.keep_best and position.best.step == position.step
        self.saver.save(position.step, boxes, self._state(position), best)
        self.engine.update_waits_for = self.saver.copy.made
        self.saved_step = position.step
        return None

    def finish(self, last: bool = False) -> None:
        """Waits for a save in progress. A failed save is reported, and the run continues with the older checkpoints,
        unless it was the last: then this raises TrainingError."""
        try:
            self.saver.wait()
        except SaveFailed as error:
            line = f"checkpoint of step {self.saved_step} could not be saved: {failure_line(error)}"
            if last:
                raise TrainingError(line) from None
            self.tell(line)
        while self.saver.told:
            self.tell(self.saver.told.pop(0))

    def restore(self) -> StartingPoint:
        """Fills the engine from the newest good checkpoint (collective). Raises TrainingError if there is none."""
        self.finish()
        start = starting_point(self.run_dir, None)
        if start.weights is None:
            raise TrainingError(f"{self.run_dir}: holds no checkpoint to rewind to")
        start.fill(self.engine)
        self.saver.starts_from(start.position.step, start.damaged)
        self.saved_step = start.position.step
        return start

    def _state(self, position: Position) -> dict[str, Any]:
        """state.json: the whole position, and the values with which a later start compares its config."""
        config, grid, health = self.config, self.engine.grid, self.health
        whole = replace(
            position,
            loss_scale=self.engine.loss_scale_state(),
            faults_in_a_row=health.in_a_row,
            faulty_step=health.faulty_step,
        )
        return {
            **asdict(whole),
            **(self.engine.router_bias.state if self.engine.router_bias is not None else {}),
            "seed": config.train.seed,
            "optimizer": config.optimizer.type,
            "sequence_length": config.data.sequence_length,
            "tokenizer": config.data.tokenizer,
            "data": config.data.model_dump(include=READ_BY),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "layout": {
                "pipe": grid.pipe.size,
                "data": grid.data.size,
                "context": grid.context.size,
                "expert": grid.expert.size,
                "tensor": grid.tensor.size,
                "zero_stage": config.zero_stage,
                "precision": config.precision,
            },
        }
