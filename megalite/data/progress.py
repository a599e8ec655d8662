"""Progress of long operations: a bar in a terminal, otherwise a line from time to time."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megalite.data.documents import STANDARD_INPUT

_LINE_SECONDS = 10.0
Item = TypeVar("Item")


class Counted:
    """Progress through `total` items: a bar on standard error in a terminal, otherwise a line every ten seconds.
    what: name of the items; visible: False on ranks that print nothing."""

    def __init__(self, what: str, total: int, visible: bool) -> None:
        self.what, self.total, self.visible = what, total, visible
        self.done, self._last = 0, time.monotonic()
        self._bar: Bar | None = None
        if visible and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.completed}/{task.total} {task.description}"),
                BarColumn(bar_width=None),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total)

    def add(self, count: int = 1) -> None:
        """Counts `count` more items as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.visible and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self.done:,} of {self.total:,} {self.what}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Counted":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def counted(items: Iterable[Item], total: int, what: str, visible: bool = True) -> Iterator[Item]:
    """Yields the items and shows the progress."""
    with Counted(what, total, visible) as progress:
        for item in items:
            yield item
            progress.add()


class Progress:
    """Progress through input files by bytes read, on standard error; without a terminal a line every ten seconds."""

    def __init__(self, inputs: Sequence[str], total_bytes: int | None) -> None:
        """total_bytes: of all inputs on disk; None if that is not known (standard input)."""
        sizes = [0 if path == STANDARD_INPUT else os.path.getsize(path) for path in inputs]
        self._before = [sum(sizes[:i]) for i in range(len(sizes))]
        self._total, self._first = total_bytes, -1
        self._start = self._last = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = ["{task.percentage:>3.0f}%"] if total_bytes else []
            self._bar = Bar(
                *[TextColumn(column) for column in columns],
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                *([TextColumn("left"), TimeRemainingColumn()] if total_bytes else []),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_bytes, rate="")

    def show(self, number: int, read_bytes: int, documents: int, tokens: int) -> None:
        """Shows the progress. read_bytes: bytes read of input `number`; documents, tokens: totals so far."""
        now, done = time.monotonic(), self._before[number] + read_bytes
        if self._first < 0:
            self._first = done  # bytes read by an earlier run do not count in this run's rate
        seconds = max(1e-9, now - self._start)
        if self._bar is not None:
            rate = f"{documents:,} documents, {tokens:,} tokens, {(done - self._first) / seconds / 1e6:.1f} MB/s"
            self._bar.update(self._task, completed=done, rate=rate)
            self._last = now
        elif now - self._last >= _LINE_SECONDS:
            self._last = now
            print(self._line(done, documents, tokens, seconds), file=sys.stderr, flush=True)

    def _line(self, done: int, documents: int, tokens: int, seconds: float) -> str:
        rate = (done - self._first) / seconds
        line = f"{documents:,} documents, {tokens:,} tokens, {rate / 1e6:.1f} MB/s"
        if self._total and rate > 0:
            left = int((self._total - done) / rate)
            line = f"{100 * done / self._total:.0f} %: {line}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return line

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.stop()
