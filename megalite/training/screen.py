"""The screen of a run: two live lines and a growing table in a terminal, plain lines elsewhere. Rank 0 only.

    step 120/200 ━━━━━━━━━━━━━━━━━━╸        0:03:12 left  12,345 tok/s  MFU 41 %
    loss 2.3456  norm 0.534  lr 1.00e-03  1.20 GiB

The bar fills the remaining width, so that 60 columns are enough.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator

import psutil
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from megalite.config.rules import machine_has_gpu
from megalite.data.position import Position
from megalite.report.numbers import clock
from megalite.training.watchers import Row, Watcher

KEPT_ROWS = 20  # about this many rows of a run stay in a terminal
LEAST_BAR = 4  # columns
REDRAW_SECONDS = 0.2
SHOWN_SAMPLES, SAMPLE_CHARACTERS = 1, 240  # report.html has all
HEADER = f"{'step':>9}  {'loss':>8}  {'norm':>8}  {'lr':>9}  {'tok/s':>9}  {'MFU':>5}"


class Screen(Watcher):
    """Shows rows of metrics. console: of the terminal; None: standard error, if it is a terminal."""

    def __init__(
        self, steps: int, first_step: int, log_interval: int, console: Console | None = None
    ) -> None:
        self.steps, self.first_step, self.log_interval = steps, first_step, log_interval
        self.process = psutil.Process()
        self.step_seconds = 0.0
        self.row: Row = {}
        self.live: Live | None = None
        self.headed, self.drawn = False, 0.0
        if console is None and sys.stderr.isatty():
            console = Console(stderr=True)
        if console is not None:
            self.console = console
            # Drawn only for new rows: rich's refresh thread would redraw the same lines again and again.
            self.live = Live(self, console=console, auto_refresh=False, transient=True)

    def after_step(self, row: Row) -> None:
        """Shows a row of training."""
        # Steps are averaged, not the time left, whose moving mean would lag behind by several steps.
        now, mean = row["step_seconds"], self.step_seconds
        self.step_seconds = 0.9 * mean + 0.1 * now if mean else now
        self.row = row
        step = row["step"]
        if self.live is None:
            if step % self.log_interval == 0 or step == self.steps:
                say(f"step {step}/{self.steps}  {self._plain(row)}")
            return
        with self._while_there():
            self._draw(self.live, row)

    def _draw(self, live: Live, row: Row) -> None:
        step, every = row["step"], max(self.log_interval, math.ceil(self.steps / KEPT_ROWS))
        if step % every == 0 or step in (self.first_step + 1, self.steps) or "skipped" in row:
            self._keep(row)
        live.start()
        if time.monotonic() - self.drawn >= REDRAW_SECONDS:
            self.drawn = time.monotonic()
            live.refresh()

    @contextlib.contextmanager
    def _while_there(self) -> Iterator[None]:
        """Wraps drawing on the terminal. Once that is gone, like a closed window, the run continues with plain
        lines."""
        try:
            yield
        except OSError:
            live, self.live = self.live, None
            if live is not None:
                with contextlib.suppress(OSError):
                    live.stop()  # first restores standard output

    def evaluated(self, row: Row) -> None:
        """Shows the loss of an evaluation."""
        for sample in row.get("samples", [])[:SHOWN_SAMPLES]:
            self.logged(f"sample: {sample['prompt']}{sample['text']}"[:SAMPLE_CHARACTERS])
        if "valid_loss" not in row:
            return
        loss, quality = row["valid_loss"], f"perplexity {row['valid_perplexity']:.5g}"
        if "valid_accuracy" in row:
            quality = f"accuracy {row['valid_accuracy']:.4f}  macro F1 {row['valid_macro_f1']:.4f}"
        if self.live is None:
            say(f"step {row['step']}  valid loss {loss:.4f}  {quality}")
            return
        line = Text(f"{row['step']:>9}  {loss:>8.4f}  ", style="bold green")
        with self._while_there():
            self.console.print(line.append(f"validation, {quality}"))

    def logged(self, text: str) -> None:
        """Shows another line."""
        if self.live is None:
            say(text)
        else:
            with self._while_there():
                self.console.print(text, highlight=False, markup=False)

    def rewound(self, position: Position) -> None:
        """Restarts the estimate of the time left."""
        self.step_seconds = 0.0

    def close(self) -> None:
        """Restores the terminal."""
        if self.live is not None:
            with self._while_there():
                self.live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The two live lines."""
        row, width = self.row, options.max_width
        done = row["step"] / self.steps
        head = f"step {row['step']}/{self.steps} "
        tail = (
            f" {self._left(row)} left  {row['tokens_per_second']:,.0f} tok/s"
            f"  MFU {100 * row['mfu']:.0f} %"
        )
        columns = width - len(head) - len(tail)
        first = Text(head, style="bold", no_wrap=True, overflow="crop")
        if columns >= LEAST_BAR:
            filled = round(columns * done)
            first.append("━" * filled, style="cyan").append("━" * (columns - filled), style="dim")
        yield first.append(tail, style="not bold")
        second = Text(no_wrap=True, overflow="crop")
        for name, value in (
            ("loss", f"{row['loss']:.4f}"),
            ("norm", f"{row['grad_norm']:.3f}"),
            ("lr", f"{row['learning_rate']:.2e}"),
        ):
            second.append(f"{name} ", style="dim").append(f"{value}  ")
        yield second.append(f"{tflops(row)}{self._memory_gib():.2f} GiB", style="dim")

    def _keep(self, row: Row) -> None:
        """Prints a row of the table."""
        if not self.headed:
            self.headed = True
            self.console.print(Text(HEADER, style="dim"))
        text = (
            f"{row['step']:>9}  {row['loss']:>8.4f}  {row['grad_norm']:>8.3f}  "
            f"{row['learning_rate']:>9.2e}  {row['tokens_per_second']:>9,.0f}  "
            f"{100 * row['mfu']:>3.0f} %"
        )
        line = Text(text, no_wrap=True, overflow="crop")
        if "skipped" in row:
            line.append(f"  {row['skipped']}: skipped", style="bold red")
        self.console.print(line)

    def _plain(self, row: Row) -> str:
        """All figures of a row in one line."""
        skipped = f"{row['skipped']}: skipped  " if "skipped" in row else ""
        return (
            f"{skipped}loss {row['loss']:.4f}  norm {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s  {tflops(row)}MFU {100 * row['mfu']:.0f} %  "
            f"{self._memory_gib():.2f} GiB  {self._left(row)} left"
        )

    def _left(self, row: Row) -> str:
        """Time that the remaining steps take at the recent pace."""
        return clock((self.steps - row["step"]) * self.step_seconds)

    def _memory_gib(self) -> float:
        """Memory of this rank: peak allocation on the device, or on a CPU the process's resident set."""
        if machine_has_gpu():
            return torch.accelerator.max_memory_allocated() / 2**30
        return self.process.memory_info().rss / 2**30


def tflops(row: Row) -> str:
    """The model's TFLOP/s on a rank; empty below 1, as on most CPUs."""
    rate = row["tflops_per_rank"]
    return f"{rate:,.0f} TFLOP/s  " if rate >= 1 else ""


class Phases:
    """Prints each phase of a start, with the seconds since the process started."""

    def __init__(self, shown: bool) -> None:
        self.shown, self.begin = shown, psutil.Process().create_time()

    def __call__(self, text: str) -> None:
        if self.shown:
            say(f"[{time.time() - self.begin:5.1f} s] {text}")


def say(text: str) -> None:
    """Prints a line. If standard output is a file on a full disk, the run continues without the line."""
    with contextlib.suppress(OSError):
        print(text, flush=True)
