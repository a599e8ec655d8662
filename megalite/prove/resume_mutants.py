"""Faults of resuming on any layout; those of shards are in parameter_mutants.py. Next: mutants.py, which lists them."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from megalite.prove.trace import Plant, Session


def of_resuming() -> Iterable[tuple[str, Plant]]:
    """The faults, by name."""
    yield "the optimizer counts its steps from zero on resuming", _restarted_steps
    yield "the run repeats a batch on resuming", _repeated_batch


def _restarted_steps(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event != "resumed":
        return
    for state in session.engine.basic_optimizer.state.values():  # type: ignore[union-attr]
        if "step" in state:
            step = state["step"]
            state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0


def _repeated_batch(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event == "resumed":
        whole = session.batches
        session.batches = lambda step, training=True: whole(max(0, step - 1), training)  # type: ignore[method-assign]
