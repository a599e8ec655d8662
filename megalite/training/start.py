"""The starting point of a run: its newest good checkpoint, other weights (`load`), or nothing.

All ranks decide together, since any of them may find a damaged file. Next: loop.py.
"""

import contextlib
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalite.checkpoint.files import (
    Checkpoint,
    checkpoints_of,
    named_best,
    newest_named,
    step_name,
    step_of,
)
from megalite.checkpoint.folder import BEST, LATEST, STEP_NAME, write_durably
from megalite.checkpoint.weights import check_names, load_shards, load_shards_from, open_together
from megalite.data.position import Position
from megalite.engine.engine import Engine
from megalite.engine.norm import GlobalNorm
from megalite.errors import CheckpointError, UserError
from megalite.hub.sources import (
    Weights,
    is_of_classifier,
    open_weights_together,
    resolve_weights,
)


@dataclass
class StartingPoint:
    """A run's first position, and the weights for its engine. told: a line for the log. damaged: names of newer
    checkpoints that were skipped."""

    position: Position
    told: str
    weights: Weights | None = None
    moments: bool = False
    damaged: tuple[str, ...] = ()
    partly: bool = False
    """The weights are of the model on which the run's classifier is based: parameters that they lack keep their initial
    values, and their head is dropped."""

    def fill(self, engine: Engine) -> None:
        """Loads weights, and on resuming also moments and the loss scale, into an engine, new or used (collective)."""
        if self.weights is None:
            return
        norm: GlobalNorm = engine.global_norm
        if not self.partly:
            check_names(self.weights, list(norm.row))
        if self.moments:
            engine.make_moments(self.position.updates)
        shards = engine.shards()  # including the moments that were just created
        if self.partly:
            held = set(self.weights.names)
            shards = [shard for shard in shards if shard.placement.name in held]
        if isinstance(self.weights, Checkpoint):
            # A checkpoint from before the first update has none.
            load_shards(self.weights, shards, self.moments and self.weights.has_moments)
        else:
            load_shards_from(self.weights.read, shards)
        if isinstance(self.weights, Checkpoint):
            self.weights.files.close()
        engine.masters_changed()
        if engine.router_bias is not None:
            engine.router_bias.restore(self.weights.state)
        engine.restore_loss_scale(self.position.loss_scale)


def starting_point(run_dir: Path, load: str | None, classes: tuple[str, ...] = ()) -> StartingPoint:
    """Looks in the run folder, then at `load` (collective). classes: labels of a run that trains a classifier. A
    damaged checkpoint is reported, and an older good one is used. Raises CheckpointError if none is good."""
    damaged: dict[str, CheckpointError] = {}
    for path in reversed(_agreed(lambda: checkpoints_of(run_dir))):
        try:
            checkpoint = open_together(path)
            _check_step(checkpoint)
        except CheckpointError as error:
            damaged[path.name] = error
            if dist.get_rank() == 0:
                print(f"{error}; looking for an older checkpoint", file=sys.stderr, flush=True)
            continue
        position = Position.from_state(checkpoint.state)
        _name_latest(run_dir, path.name)
        _name_best(run_dir, position, damaged)
        return StartingPoint(
            position, f"resuming from step {position.step}", checkpoint, True, tuple(damaged)
        )
    for error in damaged.values():
        raise error
    if load is None:
        return StartingPoint(Position(), "a new run")
    folder = _agreed(lambda: resolve_weights(load))
    weights = open_weights_together(folder, classes)
    told = f"a new run with the weights of {folder}"
    partly = bool(classes) and not is_of_classifier(weights)
    if partly:
        told += " and a new head"
    return StartingPoint(Position(), told, weights, partly=partly)


def _check_step(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a checkpoint has the name of another step, as a copy may: as the newest, it would be
    resumed from at every start, and the steps since then repeated."""
    step, named = checkpoint.state["step"], step_of(checkpoint.folder)
    if step != named:
        raise CheckpointError(
            f"{checkpoint.folder}: is of step {step}: must be named {step_name(step)}"
        )


def _name_latest(run_dir: Path, name: str) -> None:
    """Corrects `latest`, which may name an older checkpoint after a kill, or one that was found damaged."""
    if dist.get_rank() == 0 and STEP_NAME.match(name):
        with contextlib.suppress(OSError):  # nothing here reads it, and the next save writes it too
            if newest_named(run_dir) != name:
                write_durably(run_dir / "checkpoints" / LATEST, name + "\n")


def _name_best(run_dir: Path, position: Position, damaged: Collection[str]) -> None:
    """Corrects `best` if it names a checkpoint that is damaged or gone: it then names the best one that the run still
    remembers, or is removed."""
    if dist.get_rank() != 0 or (name := named_best(run_dir)) is None:
        return
    folder = run_dir / "checkpoints"
    if name not in damaged and (folder / name).exists():
        return
    remembered = "" if position.best.step is None else step_name(position.best.step)
    with contextlib.suppress(OSError):
        if remembered and (folder / remembered).exists():
            write_durably(folder / BEST, remembered + "\n")
        else:
            (folder / BEST).unlink()


def _agreed(look: Any) -> Any:
    """The result of `look` on rank 0, for every rank: folders may change between two looks. Its error is raised on
    every rank."""
    seen: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            seen[0] = look()
        except UserError as error:
            seen[1] = error
    dist.broadcast_object_list(seen)
    if seen[1] is not None:
        seen[1].agreed = True
        raise seen[1]
    return seen[0]
