"""Disks that a test can fill: a tmpfs of its own, where the test may mount one, and writes that find no room."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts one of that size (mount's option) in `folder`; skips the test where it may not."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    ).returncode:
        pytest.skip("this container may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(filler: Path) -> None:
    """Takes all the room that is left on the filler's disk."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


_write = os.write


class Disk:
    """Where `room` more bytes can be written; None: as many as one likes."""

    def __init__(self) -> None:
        self.room: int | None = None

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.room is not None:
            content = content[: self.room]
            self.room -= len(content)
            if not content:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _write(descriptor, content)
