"""`megalite.train.epochs` to `megalite.train.steps`: by the samples of the corpus and the batches of the run."""

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
    """A config, not resolved, with the steps that its epochs make on so many ranks; itself where it gives steps.

    A run that has begun keeps the samples that it consumed, whatever its batches were, and the rest is counted from
    there. check: read the corpus's index through. Raises ConfigError or DataError.
    """
    epochs = config.train.epochs
    if epochs is None or config.train.steps is not None:
        return config  # where both are given, resolve says so
    resolved = config.resolve(world_size)
    an_epoch = epoch_samples(resolved.data, check)
    wanted = math.ceil(Fraction(repr(epochs)) * an_epoch)
    step, consumed = _begun(Path(config.train.run_dir))
    steps = max(1, step + resolved.batch_plan.steps(wanted, consumed))
    line = (
        f"megalite.train.epochs: {epochs:g}: {an_epoch:,} samples an epoch, {wanted:,} in all: "
        f"megalite.train.steps {steps:,}"
    )
    keys: Sequence[str] = ("megalite.train.epochs=null", f"megalite.train.steps={steps}")
    found = Config.from_dict(apply_overrides(config.to_json(), keys))
    return replace(found, notes=(*config.notes, line))


def _begun(run_dir: Path) -> tuple[int, int]:
    """(steps, samples) of a run so far, by its newest checkpoint that can be read."""
    for folder in reversed(checkpoints_of(run_dir)):
        try:
            state = read_state(folder)
            return int(state["step"]), int(state["consumed_samples"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue  # damaged: the run takes an older one too
    return 0, 0
