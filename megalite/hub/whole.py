"""A folder that is whole or not there: written under a hidden name beside its place, then renamed."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing(target: str | Path, error: type[Exception]) -> Iterator[Path]:
    """Gives the path to make and fill; it takes the target's name at the end of the `with` block, and leaves no
    trace where that ends by an exception. `error` is raised where the target already exists."""
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise error(f"{target}: already exists; choose a new folder")
    host = socket.gethostname()
    partial = target.with_name(f".{target.name}.{host}.{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(target, host)
    except OSError as failure:
        raise error(f"{target}: cannot be made: {failure.strerror}") from failure
    try:
        yield partial
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(target: Path, host: str) -> None:
    """Removes what killed processes of this host left of the same target. Of other hosts, which may share the disk, it
    is not known who is alive."""
    form = re.compile(rf"\.{re.escape(target.name)}\.{re.escape(host)}\.(\d+)\.unfinished")
    for path in target.parent.iterdir():
        found = form.fullmatch(path.name)
        # This process has not begun yet: what has its number is of an earlier one.
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
