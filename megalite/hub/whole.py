"""A folder that is whole or not there: written under a hidden name beside its place, then renamed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def appearing(target: str | Path, error: type[Exception]) -> Iterator[Path]:
    """Gives the path to make and fill; it takes the target's name at the end of the `with` block, and leaves no
    trace where that ends by an exception. `error` is raised where the target already exists."""
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise error(f"{target}: already exists: choose a new folder; nothing is overwritten")
    partial = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise error(f"{target}: cannot be made: {failure.strerror}") from failure
    try:
        yield partial
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
