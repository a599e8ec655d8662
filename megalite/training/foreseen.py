"""Compares predictions with measurements in the first steps: memory of the first step, then the time of a few.

A prediction of time needs a known device: a GPU in plan/device_figures.py, or a file named by
`megalite.train.calibration`. Without either, only memory is predicted. Next: screen.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.plan.device_figures import Device, device_called, read_device
from megalite.plan.plan_program import planner_of
from megalite.training.watchers import Row, Watcher

KEY = "megalite.train.calibration"
SKIPPED, TIMED = 1, 3  # steps of a start: the first one includes one-time work
STATES = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def device_of_run(config: Config, device: torch.device, hosts: Sequence[str]) -> Device | None:
    """The device of this run's ranks; None if it is not known. hosts: by rank."""
    found = None
    if config.train.calibration is not None:
        found = read_device(Path(config.train.calibration), KEY)
        # The figures are for one thread: a rank with several threads is another device.
        if found.cores and torch.get_num_threads() > 1:
            found = None
    elif device.type != "cpu":
        found = device_called(torch.get_device_module(device).get_device_name(device))
    if found is None or (device.type == "cpu") != bool(found.cores):
        return None
    return replace(found, node_ranks=max(Counter(hosts).values()))


def predicted_seconds(config: Config, device: Device | None) -> float | None:
    """Predicted seconds of a step of a resolved config; None for an unknown device, for a batch ramp, and for an
    encoder-decoder, whose times the planner cannot predict."""
    if device is None or config.train.batch_ramp is not None:
        return None
    if read_spec(config.model).stacks is not None:
        return None
    _, given = planner_of(config, config.world_size, device, device.memory_bytes)
    return None if given is None else given.time.seconds


class Foreseen(Watcher):
    """Runs on rank 0. memory: predicted, by rank (about.py). seconds: predicted, per step. tell: takes lines for the
    log."""

    def __init__(
        self,
        memory: Sequence[dict[str, int]],
        seconds: float | None,
        tell: Callable[[str], None],
    ) -> None:
        self.memory, self.seconds, self.tell = memory, seconds, tell
        self.seen, self.times, self.states = 0, list[float](), ""

    def after_step(self, row: Row) -> None:
        """Adds the predictions to the rows of the first steps, and reports memory and time in one line once both are
        known."""
        self.seen += 1
        if self.seen == 1 and STATES[0] in row:
            row["predicted_states_bytes"] = [
                sum(rank[name] for name in STATES) for rank in self.memory
            ]
            self.states = states_words(row)
            if self.seconds is None:
                self.tell(self.states)
        if self.seconds is None or not SKIPPED < self.seen <= SKIPPED + TIMED:
            return
        row["predicted_step_seconds"] = self.seconds
        self.times.append(row["step_seconds"])
        if len(self.times) == TIMED:
            self.tell(f"{step_words(self.seconds, self.times, row['step'])}; {self.states}")


def states_words(row: Row) -> str:
    """Model states: the most of any rank if all are as predicted, otherwise the rank that differs most."""
    predicted = row["predicted_states_bytes"]
    held = [sum(of_rank) for of_rank in zip(*(row[name] for name in STATES), strict=True)]
    if predicted == held:
        return f"model states of up to {max(held):,} bytes per rank, as predicted"
    rank = max(range(len(held)), key=lambda rank: abs(held[rank] - predicted[rank]))
    return f"model states of rank {rank}: predicted {predicted[rank]:,} bytes, measured {held[rank]:,} bytes"


def step_words(predicted: float, measured: Sequence[float], last: int) -> str:
    """Predicted and measured seconds of a step, as text."""
    seconds = median(measured)
    off = 100 * (seconds / predicted - 1)
    steps = f"median of steps {last - len(measured) + 1} to {last}"
    return (
        f"step time: predicted {predicted:.3g} s, measured {seconds:.3g} s ({off:+.0f} %, {steps})"
    )
