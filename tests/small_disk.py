"""Small disks that a test can fill: a tmpfs, if the test may mount one, and writes that fail with a full disk."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a tmpfs of `size` (mount's option) at `folder`; skips the test if that is not permitted."""
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
    """Fills the disk of the file `filler`."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


_write = os.write


class Disk:
    """A disk to which only `room` more bytes can be written; None: no limit."""

    def __init__(self) -> None:
        self.room: int | None = None

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.room is not None:
            content = content[: self.room]
            self.room -= len(content)
            if not content:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _write(descriptor, content)
