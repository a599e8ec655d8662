"""What a person sees of a run: a live line in a terminal, plain lines elsewhere. Rank 0 only."""

import contextlib
import sys
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Screen:
    """Shows rows of metrics."""

    def __init__(self, steps: int, first_step: int, log_interval: int) -> None:
        self.steps, self.log_interval = steps, log_interval
        self.process = psutil.Process()
        self.seconds_left = 0.0
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=steps, completed=first_step)
            self.bar.start()

    def step(self, row: dict[str, Any]) -> None:
        """A row of training."""
        left = (self.steps - row["step"]) * row["step_seconds"]
        self.seconds_left = 0.9 * self.seconds_left + 0.1 * left if self.seconds_left else left
        skipped = f"{row['skipped']}: skipped  " if "skipped" in row else ""
        text = (
            f"{skipped}loss {row['loss']:.4f}  norm {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  MFU {100 * row['mfu']:.0f} %  "
            f"{self._memory_gib():.2f} GiB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=text)
        elif row["step"] % self.log_interval == 0 or row["step"] == self.steps:
            say(f"step {row['step']}/{self.steps}  {text}  {clock(self.seconds_left)} left")

    def note(self, text: str) -> None:
        """Anything else worth a line."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            say(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _memory_gib(self) -> float:
        """Of this rank: the device's where there is one, else the process's resident set."""
        if torch.accelerator.is_available():
            return torch.accelerator.max_memory_allocated() / 2**30
        return self.process.memory_info().rss / 2**30


def say(text: str) -> None:
    """A line on standard output. Where that is a file on a full disk the run continues without the line."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
