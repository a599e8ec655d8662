"""The layout of a checkpoint on disk: a folder that is either complete or does not exist.

    run/checkpoints/latest                      the name of the newest checkpoint
    run/checkpoints/best                        the name of the one with the lowest validation loss, if a run keeps it
    run/checkpoints/step_00000100/state.json    step, consumed samples and tokens, seed, the model's config, the layout
                                  index.json    every tensor's full shape and the locations of its boxes
                                  tensors_00000.safetensors …   boxes, one file per rank
                                  hugging_face/…  tokenizer and generation settings that accompany the weights
                                  SHA256SUMS    of all files, and of its own lines

A folder is written next to its destination under a hidden name, flushed to disk, and made visible by a single rename;
then `latest` is updated. `sha256sum -c SHA256SUMS` checks it too. Next: files.py, which finds, opens and reads
checkpoints.
"""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from megalite.errors import CheckpointError
from megalite.inputs import read_json_object

FORMAT = 1  # index.json lists boxes (checkpoints written by one process)
FORMAT_OF_PARTS = 2  # index.json has one part per rank (parts.py)
STATE, INDEX, SUMS = "state.json", "index.json", "SHA256SUMS"
LATEST, BEST = "latest", "best"
CARRIED = "hugging_face"
STEP_NAME = re.compile(r"^step_(\d{8,})$")
# Name of a checkpoint while another of the same step replaces it; it still counts if a kill comes before that.
REPLACED_NAME = re.compile(r"^\.step_(\d{8,})\.replaced$")
# Left by a save or removal that was killed.
LEFT_OVER_NAME = re.compile(r"^\.step_\d{8,}\.([0-9a-f]+\.partial|removed)$")
_OWN_SUM = "# of the lines above: "
# Not a path, so that an index cannot refer to files outside its folder.
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_LISTED_NAME = re.compile(rf"^({CARRIED}/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$")
MOST_DIMS = 8  # most dims of a tensor


@dataclass
class StoredBox:
    """A stored box: its start and shape in the full tensor, its file and the key in it. run: (n, first) if the key
    stores n numbers, of which those from `first` on are the box; None if it stores the box alone, in its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    run: tuple[int, int] | None = None


@dataclass
class Entry:
    """A tensor of a checkpoint: full shape, dtype, boxes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[StoredBox] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Index:
    """Every tensor of a checkpoint by name: `weight/…`, `exp_avg/…`, `exp_avg_sq/…`."""

    entries: dict[str, Entry] = field(default_factory=dict)
    format: ClassVar[int] = FORMAT

    def add(self, name: str, entry: Entry, chunk: StoredBox) -> None:
        """Adds a box to the tensor of that name, which is created from `entry` if it is new."""
        self.entries.setdefault(name, entry).chunks.append(chunk)

    def chunks(self, name: str, rows: range | None = None) -> Iterator[StoredBox]:
        """The boxes of a tensor. rows: return at least those with elements in these rows of its first dim."""
        yield from self.entries[name].chunks

    def bytes_by_file(self) -> dict[str, int]:
        """Total bytes of the boxes in each file."""
        result: dict[str, int] = defaultdict(int)
        for entry in self.entries.values():
            for chunk in entry.chunks:
                result[chunk.file] += math.prod(chunk.shape) * entry.dtype.itemsize
        return result

    def boxes_by_file(self) -> dict[str, int]:
        """Number of boxes in each file."""
        return Counter(chunk.file for entry in self.entries.values() for chunk in entry.chunks)

    def check_whole(self) -> None:
        """Raises CheckpointError unless every element of every tensor is stored exactly once."""
        for name, entry in self.entries.items():
            boxes = [(chunk.offsets, chunk.shape) for chunk in entry.chunks]
            check_tiled(name, entry.shape, boxes, sum(math.prod(shape) for _, shape in boxes))

    def to_json(self) -> dict[str, Any]:
        return {
            name: {
                "shape": entry.shape,
                "dtype": str(entry.dtype).removeprefix("torch."),
                "boxes": [[c.offsets, c.shape, c.file, c.key] for c in entry.chunks],
            }
            for name, entry in sorted(self.entries.items())
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Index":
        index = cls()
        for name, entry in value.items():
            chunks = [
                StoredBox(tuple(o), tuple(s), file, key) for o, s, file, key in entry["boxes"]
            ]
            for chunk in chunks:
                check_file_name(chunk.file)
                if any(type(number) is not int for number in (*chunk.offsets, *chunk.shape)):
                    raise ValueError(f"{name}: a box must be given by integers")
            if len(entry["shape"]) > MOST_DIMS:
                raise ValueError(f"{name}: {len(entry['shape'])} dims: must be at most {MOST_DIMS}")
            index.entries[name] = Entry(tuple(entry["shape"]), dtype_named(entry["dtype"]), chunks)
        return index


def check_file_name(name: str) -> None:
    """Raises ValueError if it is a path, so that an index cannot refer to files outside its folder."""
    if not _PLAIN_NAME.match(name):
        raise ValueError(f"{name}: must be the name of a file in the folder")


def check_tiled(
    name: str,
    full_shape: tuple[int, ...],
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    held: int,
) -> None:
    """Raises CheckpointError unless boxes (start, shape) fill a tensor without overlapping. held: number of elements
    stored for them."""
    corners = defaultdict[tuple[int, ...], int](int)
    for offsets, shape in boxes:
        for start, count, size in zip(offsets, shape, full_shape, strict=True):
            if start >= 0 and count >= 0 and start + count <= size:
                continue
            raise CheckpointError(f"{name}: box {shape} at {offsets}: must be within {full_shape}")
        _add_corners(corners, offsets, shape, 1)
    if held != math.prod(full_shape):
        raise CheckpointError(
            f"{name}: {held} of {math.prod(full_shape)} elements stored: each must be stored once"
        )
    _add_corners(corners, (0,) * len(full_shape), full_shape, -1)
    if any(corners.values()):
        raise CheckpointError(f"{name}: its boxes overlap: each element must be stored once")


def _add_corners(
    counts: dict[tuple[int, ...], int], offsets: tuple[int, ...], shape: tuple[int, ...], times: int
) -> None:
    """Adds `times` to the count of each corner of a box, with its sign by inclusion and exclusion. A sum of indicator
    functions of boxes equals that of another box if and only if their counts are equal, so n boxes take n steps."""
    ends = [(start, start + count) for start, count in zip(offsets, shape, strict=True)]
    for corner, sign in zip(itertools.product(*ends), _signs(len(shape)), strict=True):
        counts[corner] += sign * times


@functools.cache
def _signs(dims: int) -> tuple[int, ...]:
    return tuple(math.prod(signs) for signs in itertools.product((1, -1), repeat=dims))


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name in an index. Raises KeyError for any other name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_flushed(path: Path, content: bytes) -> str:
    """Writes a small file, flushes it to disk and returns its SHA-256. Its name is durable once its folder is
    flushed."""
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(content))
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def write_all(descriptor: int, content: memoryview) -> None:
    """Writes all of `content`: a single call may write less, on a full disk or at a signal."""
    while content:
        content = content[os.write(descriptor, content) :]


def write_durably(path: Path, text: str) -> None:
    """Replaces a small file atomically: writes a temporary file next to it, flushes that, and renames it."""
    beside = path.with_name(f".{path.name}.partial")
    write_flushed(beside, text.encode())
    os.replace(beside, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes names that were created or changed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Transaction:
    """Writes one checkpoint: `begin`, write files to `partial`, `publish`; or `abandon`, which leaves no trace.

    state: content of state.json; carried: small files that accompany the weights, by name. Called by one rank; the
    others only write to its `partial`, on a file system that all of them share. Each start uses a folder with a new
    name, so ranks of an earlier start that are still writing cannot interfere.
    """

    folder: Path
    state: dict[str, Any]
    carried: Mapping[str, bytes] = field(default_factory=dict)
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.partial = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(4)}.partial")

    def begin(self) -> None:
        """Creates the empty unpublished folder."""
        existing = next(path for path in self.partial.parents if path.exists())
        self.partial.mkdir(parents=True)
        for created in self.partial.parents:
            if created == existing:
                break
            flush_folder(created.parent)

    def publish(self, index: Index, digests: dict[str, str]) -> None:
        """Completes the folder and makes it visible by a single rename. digests: of the files in it, by name."""
        index.check_whole()
        if self.carried:
            (self.partial / CARRIED).mkdir()
            for name, content in self.carried.items():
                digests[f"{CARRIED}/{name}"] = write_flushed(self.partial / CARRIED / name, content)
            flush_folder(self.partial / CARRIED)
        state = json.dumps({"format": index.format, **self.state}, indent=1)
        listed = json.dumps(index.to_json(), separators=(",", ":"))
        for name, text in ((STATE, state), (INDEX, listed)):
            digests[name] = write_flushed(self.partial / name, text.encode())
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        own = hashlib.sha256(lines.encode()).hexdigest()
        write_flushed(self.partial / SUMS, f"{lines}{_OWN_SUM}{own}\n".encode())
        flush_folder(self.partial)
        # A checkpoint of this step may exist: a damaged one, or one from before the run rewound.
        if self.folder.exists():
            replaced = self.folder.with_name(f".{self.folder.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.folder, replaced)
            # A kill here leaves the old checkpoint, which `checkpoints_of` finds under this name.
            os.rename(self.partial, self.folder)
            flush_folder(self.folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(self.partial, self.folder)
            flush_folder(self.folder.parent)

    def abandon(self) -> None:
        """Removes everything that was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def read_sums(folder: Path) -> dict[str, str]:
    """The files of a checkpoint and their SHA-256. Raises CheckpointError if SHA256SUMS is missing or damaged."""
    path = folder / SUMS
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: damaged: is not UTF-8") from None
    lines, mark, own = text.rpartition(_OWN_SUM)
    if not mark or own != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise CheckpointError(
            f"{path}: damaged: its last line is not the SHA-256 of the lines above"
        )
    rows = [line.partition("  ") for line in lines.splitlines()]
    sums = {name: digest for digest, _, name in rows}
    for name in (STATE, INDEX, *sums):
        if not _LISTED_NAME.match(name) or name not in sums:
            raise CheckpointError(f"{path}: {name}: must be listed, by a plain file name")
    return sums


def check_file(folder: Path, name: str, digest: str) -> None:
    """Raises CheckpointError that names the file if it is missing or has another SHA-256."""
    path = folder / name
    try:
        found = file_digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if found != digest:
        raise CheckpointError(f"{path}: damaged: SHA-256 {found[:12]}… must be {digest[:12]}…")


def check_carried(folder: Path, sums: dict[str, str]) -> None:
    """Raises CheckpointError if `hugging_face/` contains a file that is not in SHA256SUMS: it would be read too."""
    for path in sorted((folder / CARRIED).iterdir()) if (folder / CARRIED).is_dir() else []:
        if f"{CARRIED}/{path.name}" not in sums:
            raise CheckpointError(
                f"{path}: is not in {SUMS}: must be a file that was saved with the weights"
            )


def read_checked_json(folder: Path, name: str, digest: str) -> dict[str, Any]:
    """A JSON object of a checkpoint, parsed only after its SHA-256 has been checked."""
    path = folder / name
    check_file(folder, name, digest)
    value = read_json_object(path, CheckpointError)
    if name == STATE and value.get("format") not in (FORMAT, FORMAT_OF_PARTS):
        raise CheckpointError(
            f"{path}: format: {value.get('format')!r}: must be {FORMAT} or {FORMAT_OF_PARTS}"
        )
    return value
