"""Writes a folder atomically: under a hidden name next to its destination, then renamed."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing(target: str | Path, error: type[Exception]) -> Iterator[Path]:
    """Context manager that gives the path of a folder to create and fill. At the end of the block it is renamed to
    `target`; after an exception it is removed. Raises `error` if the target already exists."""
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise error(f"{target}: already exists; choose a new folder")
    host = socket.gethostname()
    partial = target.with_name(f".{target.name}.{host}.{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(target, host)
    except OSError as failure:
        raise error(f"{target}: cannot be created: {failure.strerror}") from failure
    try:
        yield partial
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(target: Path, host: str) -> None:
    """Removes the remains of killed processes of this host for the same target. For other hosts, which may share the
    disk, it is not known which processes are alive."""
    form = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(host)}\.(\d+)\.unfinished")
    for path in target.parent.iterdir():
        found = form.fullmatch(path.name)
        # This process has not written anything yet: a folder with its number is from an earlier process.
        if found is not None and (int(found[1]) == os.getpid() or not _is_alive(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
