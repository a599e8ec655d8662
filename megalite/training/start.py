"""Where a run starts from: its own newest good checkpoint, other weights (`load`), or nothing.

All ranks decide together, since any of them may find a file damaged. Next: loop.py.
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
class Start:
    """A run's first position, and what its engine is to be filled with. told: for the log; damaged: names of newer
    checkpoints that were passed over."""

    position: Position
    told: str
    weights: Weights | None = None
    moments: bool = False
    damaged: tuple[str, ...] = ()
    partly: bool = False
    """The weights are of a model that the run's classifier is made of: what they do not have keeps the values by (seed,
    name), and their own head goes."""

    def fill(self, engine: Engine) -> None:
        """Puts weights, and on resuming moments and the loss scale, into an engine, fresh or not (collective)."""
        if self.weights is None:
            return
        norm: GlobalNorm = engine.global_norm
        if not self.partly:
            check_names(self.weights, list(norm.row))
        if self.moments:
            engine.make_moments(self.position.updates)
        shards = engine.shards()  # with the moments that were just made
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


def starting_point(run_dir: Path, load: str | None, classes: tuple[str, ...] = ()) -> Start:
    """Looks at the run folder, then at `load` (collective). classes: labels of a run that trains a classifier. A
    damaged checkpoint is named, and an older good one taken; CheckpointError where none is good."""
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
        return Start(
            position, f"resuming from step {position.step}", checkpoint, True, tuple(damaged)
        )
    for error in damaged.values():
        raise error
    if load is None:
        return Start(Position(), "a new run")
    folder = _agreed(lambda: resolve_weights(load))
    weights = open_weights_together(folder, classes)
    told = f"a new run with the weights of {folder}"
    partly = bool(classes) and not is_of_classifier(weights)
    if partly:
        told += " and a new head"
    return Start(Position(), told, weights, partly=partly)


def _check_step(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a checkpoint has the name of another step, as a copy may: as the newest, it would be
    resumed from at every start, and the steps since then repeated."""
    step, named = checkpoint.state["step"], step_of(checkpoint.folder)
    if step != named:
        raise CheckpointError(
            f"{checkpoint.folder}: is of step {step}: must be named {step_name(step)}"
        )


def _name_latest(run_dir: Path, name: str) -> None:
    """`latest` may name an older one, after a kill, or one that was found damaged."""
    if dist.get_rank() == 0 and STEP_NAME.match(name):
        with contextlib.suppress(OSError):  # nothing here reads it, and the next save writes it too
            if newest_named(run_dir) != name:
                write_durably(run_dir / "checkpoints" / LATEST, name + "\n")


def _name_best(run_dir: Path, position: Position, damaged: Collection[str]) -> None:
    """`best` may name a later checkpoint than the one that a run starts from, where that is damaged: then the best
    that the run still remembers takes its place, or none."""
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
    """What rank 0 sees, on every rank: folders may change between two looks. Its error is every rank's."""
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
