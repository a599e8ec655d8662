"""The check of whole corpora: the index, every token id, and checksums if there are any.

It reads each file once and stores the result, by path, sizes and times, in the user's cache folder
(`$XDG_CACHE_HOME/megalite` or `~/.cache/megalite`): the range of ids, so that the check for another vocabulary
need not read the corpus again. If the folder cannot be written, the check is repeated each time.

`prefix.sha256` is optional; it has the format of `sha256sum`, which can check it too.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.indexed import IndexedCorpus, files_of
from megalite.errors import DataError

_CHUNK = 1 << 22  # tokens read at a time


def check_corpus(prefix: str, vocabulary_size: int) -> None:
    """Checks one corpus completely. Raises DataError with the file and the position in it."""
    corpus = IndexedCorpus(prefix)
    key, stamp = str(corpus.tokens_path.resolve()), _stamp(corpus)
    found = _remembered().get(key, {})
    if found.get("stamp") != stamp:
        lowest, highest = read_through(corpus)
        found = {"stamp": stamp, "lowest": lowest, "highest": highest}
        _remember(key, found)
    if found["lowest"] < 0 or found["highest"] >= vocabulary_size:
        raise unknown_id_of(corpus, vocabulary_size)


def read_through(corpus: IndexedCorpus) -> tuple[int, int]:
    """Checks the index and the checksums and returns the lowest and the highest token id. Raises DataError."""
    corpus.check_index()
    sums = _read_checksums(corpus)
    if corpus.index_path.name in sums:
        _compare(corpus.index_path, _sha256(corpus.index_path), sums)
    total, lowest, highest = hashlib.sha256(), int(corpus.tokens[0]), int(corpus.tokens[0])
    for start in range(0, corpus.num_tokens, _CHUNK):
        part = corpus.tokens[start : start + _CHUNK]
        lowest, highest = min(lowest, int(part.min())), max(highest, int(part.max()))
        if sums:
            total.update(part.data)
    if corpus.tokens_path.name in sums:
        _compare(corpus.tokens_path, total.hexdigest(), sums)
    return lowest, highest


def checksum_lines(files: dict[Path, Path]) -> str:
    """The content of `prefix.sha256`. files: for each file that it names, the path of the file to read."""
    return "".join(f"{_sha256(path)}  {name.name}\n" for name, path in files.items())


def write_checksums(prefix: str | Path) -> None:
    """Writes `prefix.sha256` for an existing corpus."""
    partial = Path(f"{prefix}.sha256.partial")
    partial.write_text(checksum_lines({path: path for path in files_of(prefix)}))
    os.replace(partial, checksum_file(prefix))


def checksum_file(prefix: str | Path) -> Path:
    """`prefix.sha256`"""
    return Path(f"{prefix}.sha256")


def unknown_id(corpus: IndexedCorpus, index: int, vocabulary_size: int) -> DataError:
    """The error for a token id outside the vocabulary."""
    return DataError(
        f"{corpus.tokens_path}: byte {index * corpus.dtype.itemsize}: token {index} (document "
        f"{corpus.document_at(index)}) is {corpus.tokens[index]}: must be from 0 to {vocabulary_size - 1}, the "
        f"vocabulary's ids"
    )


def unknown_id_of(corpus: IndexedCorpus, vocabulary_size: int) -> DataError:
    """The error for the first token id outside the vocabulary, in a corpus that has one."""
    for start in range(0, corpus.num_tokens, _CHUNK):
        part = corpus.tokens[start : start + _CHUNK]
        outside = np.flatnonzero((part < 0) | (part >= vocabulary_size))
        if outside.size:
            return unknown_id(corpus, start + int(outside[0]), vocabulary_size)
    raise AssertionError(f"{corpus.tokens_path}: changed while it was read")


def _read_checksums(corpus: IndexedCorpus) -> dict[str, str]:
    """Checksums by file name; empty if there is no checksum file."""
    path = checksum_file(corpus.prefix)
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: cannot be read as a checksum file") from None
    wanted = {file.name for file in files_of(corpus.prefix)}
    if any(len(row) != 2 for row in rows) or {row[1].lstrip("*") for row in rows} != wanted:
        raise DataError(
            f"{path}: must have one line `checksum  name` for each of {', '.join(sorted(wanted))}"
        )
    return {row[1].lstrip("*"): row[0] for row in rows}


def _compare(path: Path, found: str, sums: dict[str, str]) -> None:
    if sums[path.name] != found:
        raise DataError(
            f"{path}: SHA-256 is {found[:12]}…, must be {sums[path.name][:12]}… as in {path.stem}.sha256: damaged, or "
            "rewritten without updating that file"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(corpus: IndexedCorpus) -> list[int]:
    paths = [corpus.index_path, corpus.tokens_path, checksum_file(corpus.prefix)]
    stats = [os.stat(path) for path in paths if path.exists()]
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]


def _cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "megalite" / "checked_data.json"


def _remembered() -> dict[str, Any]:
    try:
        value = json.loads(_cache_file().read_text())
    except (OSError, RuntimeError, ValueError):  # missing file, no home folder, incomplete file
        return {}
    return value if isinstance(value, dict) else {}


def _remember(path: str, found: dict[str, Any]) -> None:
    try:
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_remembered() | {path: found}, indent=1))
        os.replace(partial, file)
    except (OSError, RuntimeError):
        return
