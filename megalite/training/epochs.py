"""Converts `megalite.train.epochs` to `megalite.train.steps`, from the samples of the corpus and the run's batches."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megalite.checkpoint.files import checkpoints_of, read_state
from megalite.config import Config
from megalite.config.reading import apply_overrides
from megalite.data.loader import epoch_samples
from megalite.errors import CheckpointError


def with_steps(config: Config, world_size: int, check: bool) -> Config:
    """A config, not resolved, with the steps that its epochs take on `world_size` ranks; unchanged if it has steps.

    A run that has already started keeps the samples that it has consumed, whatever its batches were, and the rest is
    counted from there. check: validate the whole index of the corpus. Raises ConfigError or DataError.
    """
    epochs = config.train.epochs
    if epochs is None or config.train.steps is not None:
        return config  # if both are given, resolve refuses it
    resolved = config.resolve(world_size)
    an_epoch = epoch_samples(resolved.data, check)
    wanted = math.ceil(Fraction(repr(epochs)) * an_epoch)
    step, consumed = _begun(Path(config.train.run_dir))
    steps = max(1, step + resolved.batch_plan.steps(wanted, consumed))
    line = (
        f"megalite.train.epochs: {epochs:g}: {an_epoch:,} samples per epoch, {wanted:,} in all: "
        f"megalite.train.steps {steps:,}"
    )
    keys: Sequence[str] = ("megalite.train.epochs=null", f"megalite.train.steps={steps}")
    found = Config.from_dict(apply_overrides(config.to_json(), keys))
    return replace(found, notes=(*config.notes, line))


def _begun(run_dir: Path) -> tuple[int, int]:
    """(steps, samples) of a run so far, from its newest readable checkpoint."""
    for folder in reversed(checkpoints_of(run_dir)):
        try:
            state = read_state(folder)
            return int(state["step"]), int(state["consumed_samples"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # damaged: the run also uses an older one
    return 0, 0
