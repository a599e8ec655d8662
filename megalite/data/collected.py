"""Writes the texts that tools/collect_*.py collect, in folders where users may have their own."""

from collections.abc import Iterable
from pathlib import Path

from megalite.errors import DataError


def write_collected(path: Path, lines: Iterable[str]) -> None:
    """Writes lines, each with its newline, atomically. Does nothing if the file already has that content. Raises
    DataError if it has other content, which may be the user's, and OSError."""
    content = "".join(lines).encode()
    if path.exists() or path.is_symlink():
        if not path.is_file() or path.read_bytes() != content:
            rule = "already exists with other content; choose another folder or remove it"
            raise DataError(f"{path}: {rule}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
