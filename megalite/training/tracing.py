"""A watcher that records the timeline of a step: a trace of all ranks for Perfetto, and a breakdown of the step's time.

Neither costs anything when it is off. A traced step waits for the device at its start and end; a split step does not.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.folder import write_durably
from megalite.data.position import Position
from megalite.engine.collective_spans import WORLD, recording_collectives
from megalite.parallel.grid import Grid
from megalite.parallel.timeline import RANK_TIMELINE, Span
from megalite.programs.program import Action, Value
from megalite.report.read import TRACE
from megalite.report.trace_events import Event, process_name
from megalite.topology.axes import PLANES
from megalite.training.watchers import Row, Watcher

WAITED_IN = (*PLANES, "ends", WORLD)  # the axes that collectives are over
PARTS = ("compute", *map("wait {}".format, WAITED_IN), "data", "update", "checkpoint", "other")
"""Parts of a step's time, as named by `split`."""
EXCHANGES = 8  # with rank 0; the fastest one determines the difference of the clocks


class StepTimeline(Watcher):
    """steps: to be traced. every: interval of steps whose time is broken down; 0: none."""

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        run_dir: Path,
        steps: Collection[int],
        every: int,
        log: Callable[[str], None],
    ) -> None:
        self.grid, self.device, self.path = grid, device, run_dir / TRACE
        self.steps, self.every, self.log = set(steps), every, log
        self.recording = contextlib.ExitStack()
        self.offset = 0.0

    def before_step(self, position: Position) -> None:
        """Starts recording if the step is traced or split; a traced step measures the clocks (collective)."""
        step = position.step + 1
        if step in self.steps:
            self.offset = clock_offset(self.grid)
        if step in self.steps or self._splits(step):
            self.recording.enter_context(recording_collectives(self.grid))
            RANK_TIMELINE.begin(self.device)

    def after_step(self, row: Row) -> None:
        """Adds `split_seconds`, and writes the trace (collective in those steps)."""
        if not RANK_TIMELINE.on:
            return
        step = row["step"]
        self.recording.close()
        spans = RANK_TIMELINE.take(wait=step in self.steps)
        if self._splits(step):
            row["split_seconds"] = self._mean(split(spans, row))
        if step in self.steps:
            everyone: list[Any] = [None] * self.grid.world_size
            own = events_of(spans, self.grid, step, self.offset)
            dist.all_gather_object(everyone, own)
            if self.grid.rank == 0:
                self._write(step, [event for events in everyone for event in events])

    def close(self) -> None:
        """Stops recording, in case the step has failed."""
        self.recording.close()

    def _splits(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _mean(self, own: dict[str, float]) -> dict[str, float]:
        """The mean over the ranks (collective). A part that a rank lacks counts as 0; one that all lack is omitted."""
        seconds = torch.tensor([own.get(part, 0.0) for part in PARTS], dtype=torch.float64)
        dist.all_reduce(seconds)
        means = (seconds / self.grid.world_size).tolist()
        return {part: mean for part, mean in zip(PARTS, means, strict=True) if mean}

    def _write(self, step: int, events: list[Event]) -> None:
        """Adds the step to the one file for all steps and starts; an earlier trace of this step is replaced."""
        try:
            kept = json.loads(self.path.read_bytes())["traceEvents"]
        except (OSError, ValueError, KeyError):
            kept = []
        kept = [event for event in kept if event.get("args", {}).get("step", step) != step]
        try:
            write_durably(self.path, json.dumps({"traceEvents": kept + events}) + "\n")
        except OSError as error:
            self.log(f"{self.path}: cannot be written: {error.strerror}; the run continues")
            return
        self.log(f"step {step}: traced: {self.path}, for https://ui.perfetto.dev")


def split(spans: Sequence[Span], row: Row) -> dict[str, float]:
    """Seconds of this rank in a step: compute, waits by axis, for data and for checkpoints, and the rest.

    A wait includes the transfer. `compute` is forward and backward, `update` is what follows. The device's work after
    the norm is not known without waiting for it, and is part of `other`.
    """
    found: dict[str, float] = {"compute": 0.0}

    def add(name: str, seconds: float) -> None:
        found[name] = found.get(name, 0.0) + seconds

    for span in spans:
        seconds = span.end - span.start
        match span.kind:
            case "action":
                add("compute", seconds)
            case "receive" | "sent":
                add("wait pipe", seconds)
            case "collective":
                add(f"wait {span.what[1]}", seconds)
                if span.inside in ("action", "update"):
                    add("compute" if span.inside == "action" else "update", -seconds)
            case "data" | "update":
                add(span.kind, seconds)
    if "checkpoint_seconds" in row:
        found["checkpoint"] = row["checkpoint_seconds"]
    found["other"] = max(0.0, row["step_seconds"] - sum(found.values()))
    return found


def clock_offset(grid: Grid) -> float:
    """Seconds to add to this rank's `time.perf_counter` to get rank 0's (collective over the world).

    By Cristian's algorithm (Distributed Computing 3, 1989): rank 0's answer is taken as its time at the middle of the
    exchange; the fastest of a few exchanges is used, and is off by at most half its length.
    """
    if grid.world_size == 1:
        return 0.0
    message, best, offset = torch.zeros(1, dtype=torch.float64), float("inf"), 0.0
    for rank in range(1, grid.world_size):
        for _ in range(EXCHANGES):
            if grid.rank == 0:
                dist.recv(message, rank)
                message[0] = time.perf_counter()
                dist.send(message, rank)
            elif grid.rank == rank:
                start = time.perf_counter()
                dist.send(message, 0)
                dist.recv(message, 0)
                end = time.perf_counter()
                if end - start < best:
                    best, offset = end - start, message.item() - (start + end) / 2
    return offset


def events_of(spans: Sequence[Span], grid: Grid, step: int, offset: float) -> list[Event]:
    """This rank's events in the Trace Event Format. Messages are arrows from the sending rank to the wait of the
    receiving one."""
    rank, pipe, axes = grid.rank, grid.pipe, grid.sizes.axes
    events = [process_name(rank, f"rank {rank}: {grid.sizes.described(rank)}")]
    for span in spans:
        category, name = _named(span)
        event = {
            "name": name,
            "cat": category,
            "ph": "X",
            "pid": rank,
            "tid": 0,
            "ts": 1e6 * (span.start + offset),
            "dur": 1e6 * (span.end - span.start),
            "args": {"step": step, "kind": getattr(span.what, "kind", span.kind)},
        }
        if category == "action":
            event["args"]["grid"] = axes  # a later start may add steps of another grid to the file
        events.append(event)
        if span.kind in ("send", "receive") and isinstance(span.what, Value):
            # Both ends name the pipeline by its first rank.
            message = f"{step}/{pipe.ranks[0]}/{span.what}"
            arrow = {"name": str(span.what), "cat": "message", "id": message, "pid": rank, "tid": 0}
            arrow["args"] = {"step": step}
            if span.kind == "send":
                events.append(arrow | {"ph": "s", "ts": event["ts"]})
            else:
                events.append(arrow | {"ph": "f", "bp": "e", "ts": event["ts"] + event["dur"]})
    return events


def _named(span: Span) -> tuple[str, str]:
    """Category and name of a span. Waits for messages are the pipeline's bubbles."""
    match span.kind, span.what:
        case "action", Action():
            return "action", str(span.what)
        case "receive", _:
            return "bubble", f"bubble: wait for {span.what}"
        case "sent", _:
            return "bubble", f"bubble: wait until {span.what} was received"
        case "send", _:
            return "message", f"send {span.what}"
        case "collective", (function, axis):
            return "collective", f"{function} over {axis}"
    return span.kind, str(span.what)
