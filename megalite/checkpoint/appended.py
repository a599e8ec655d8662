"""A file that rows are appended to. If its disk is full or unreachable, the run continues and the rows wait in memory.

checkpoint/folder.py writes files that are replaced as a whole.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.folder import write_all

WAITING_BYTES = 8 << 20  # some 20,000 rows of metrics.jsonl; beyond that the oldest are lost


class Appended:
    """Appends rows for a single writer. log: called with a log line when writing begins to fail, and when it works
    again."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log
        self.waiting: deque[bytes] = deque()
        self.waiting_bytes = self.lost = 0
        self.failing = False
        self.descriptor: int | None = None
        self.end: int | None = None  # length of the file up to the last whole row

    def append(self, row: bytes) -> None:
        """Appends a row, after those that are waiting; never raises OSError."""
        self.waiting.append(row)
        self.waiting_bytes += len(row)
        try:
            self._write()
        except OSError as error:
            if not self.failing:
                self.log(
                    f"{self.path}: cannot be written: {error.strerror}; the run continues, rows wait in memory"
                )
            self.failing = True
            while self.waiting_bytes > WAITING_BYTES:
                self._taken()
                self.lost += 1
            return
        if self.failing:
            self.log(f"{self.path}: can be written again; {self._lost_rows()}")
            self.failing, self.lost = False, 0

    def close(self) -> None:
        """Writes the rows that are waiting, as far as possible."""
        if self.waiting:
            with contextlib.suppress(OSError):
                self._write()
            self.lost += len(self.waiting)
            self.log(f"{self.path}: {self._lost_rows()}")
            self.waiting.clear()
        self._close()

    def _write(self) -> None:
        if self.descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if self.end is None:
                self.end = os.fstat(self.descriptor).st_size
            # Part of a row may have been written.
            os.ftruncate(self.descriptor, self.end)
        assert self.end is not None
        try:
            while self.waiting:
                write_all(self.descriptor, memoryview(self.waiting[0]))
                self.end += self._taken()
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.end)
            self._close()
            raise

    def _close(self) -> None:
        if self.descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self.descriptor)
            self.descriptor = None

    def _taken(self) -> int:
        count = len(self.waiting.popleft())
        self.waiting_bytes -= count
        return count

    def _lost_rows(self) -> str:
        return "1 row was lost" if self.lost == 1 else f"{self.lost or 'no'} rows were lost"
