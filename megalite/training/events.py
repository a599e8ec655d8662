"""TensorBoard's event files, written row by row: torch's SummaryWriter has a thread that a full disk ends permanently.

A file is a sequence of records: u64 length, its checksum, an Event as a protocol buffer, its checksum.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.appended import Appended

# Numbers the files of one process, which may open several within a second.
_numbers = itertools.count()


class Events:
    """Appends figures to a new event file. If the run starts from a step, TensorBoard ignores later steps of earlier
    files."""

    def __init__(self, folder: Path, first_step: int, log: Callable[[str], None]) -> None:
        # Imported here because it takes longer than the rest of the start.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.of_event: Any = event_pb2
        self.of_summary: Any = summary_pb2
        self.writer = RecordWriter
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.file = Appended(folder / name, log)
        self._append(file_version="brain.Event:2")
        if first_step:
            session = self.of_event.SessionLog
            self._append(step=first_step + 1, session_log=session(status=session.START))

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Appends one event with all of a row's figures, rounded to fp32."""
        summary = self.of_summary.Summary
        values = [summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._append(step=step, summary=summary(value=values))

    def append_text(self, step: int, name: str, text: str) -> None:
        """Appends one event with a text, which TensorBoard shows as Markdown."""
        from torch.utils.tensorboard.summary import text as summary_of

        self._append(step=step, summary=summary_of(name, text))

    def close(self) -> None:
        self.file.close()

    def _append(self, **fields: object) -> None:
        record = io.BytesIO()
        self.writer(record).write(
            self.of_event.Event(wall_time=time.time(), **fields).SerializeToString()
        )
        self.file.append(record.getvalue())
