"""Texts that a tool has collected (tools/collect_*.py), written where a user may have texts of the same names."""

from collections.abc import Iterable
from pathlib import Path

from megalite.errors import DataError


def write_collected(path: Path, lines: Iterable[str]) -> None:
    """Writes lines, each with its end, as a whole; nothing where the file has that content. DataError where it has
    another one, which may be the user's own; OSError."""
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
