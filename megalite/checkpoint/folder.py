"""What a checkpoint is on disk: a folder that is whole or not there.

    run/checkpoints/latest                      the name of the newest
    run/checkpoints/step_00000100/state.json    step, consumed samples and tokens, seed, the model's config, the layout
                                  index.json    every tensor's full shape and where its boxes lie
                                  tensors_00000.safetensors …   boxes, one file a rank
                                  hugging_face/…  tokenizer and generation settings that go with the weights
                                  SHA256SUMS    of all files, and of its own lines

A folder is written beside under a hidden name, flushed to disk, and made visible by one rename; `latest` follows.
`sha256sum -c SHA256SUMS` checks it too. Next: files.py, which finds, opens and reads checkpoints.
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
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalite.errors import CheckpointError
from megalite.inputs import read_json_object

FORMAT = 1
STATE, INDEX, SUMS, LATEST = "state.json", "index.json", "SHA256SUMS", "latest"
CARRIED = "hugging_face"
STEP_NAME = re.compile(r"^step_(\d{8,})$")
REPLACED_NAME = re.compile(
    r"^\.step_(\d{8,})\.replaced$"
)  # was hidden to make room; counts where there is no step_…
LEFT_OVER_NAME = re.compile(
    r"^\.step_\d{8,}\.([0-9a-f]+\.partial|removed)$"
)  # what a killed save or removal leaves
_OWN_SUM = "# of the lines above: "
_PLAIN_NAME = re.compile(
    r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
)  # no path: an index cannot point out of its folder
_LISTED_NAME = re.compile(rf"^({CARRIED}/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_READ_BYTES = 1 << 22
_MOST_DIMS = 8  # of a tensor


@dataclass
class Chunk:
    """A stored box: first index and shape in the full tensor, the file and the key there."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    digest: str = ""  # of the whole file, on its way from the rank that wrote it to the coordinator


@dataclass
class Entry:
    """A tensor of a checkpoint: full shape, dtype, boxes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Index:
    """Every tensor of a checkpoint by name: `weight/…`, `exp_avg/…`, `exp_avg_sq/…`."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, name: str, entry: Entry, chunk: Chunk) -> None:
        """Puts a box into the tensor of that name, made as `entry` where it is new."""
        self.entries.setdefault(name, entry).chunks.append(chunk)

    def chunk(self, name: str, offsets: tuple[int, ...]) -> Chunk:
        """The box that begins at `offsets`."""
        return next(chunk for chunk in self.entries[name].chunks if chunk.offsets == offsets)

    def check_whole(self) -> None:
        """CheckpointError unless every element of every tensor is stored exactly once."""
        for name, entry in self.entries.items():
            held, corners = 0, defaultdict[tuple[int, ...], int](int)
            for chunk in entry.chunks:
                ends = zip(chunk.offsets, chunk.shape, entry.shape, strict=True)
                if not all(
                    start >= 0 and count >= 0 and start + count <= size
                    for start, count, size in ends
                ):
                    raise CheckpointError(
                        f"{name}: box {chunk.shape} at {chunk.offsets}: must lie in {entry.shape}"
                    )
                held += torch.Size(chunk.shape).numel()
                _add_corners(corners, chunk.offsets, chunk.shape, 1)
            if held != entry.numel:
                raise CheckpointError(
                    f"{name}: {held} elements of {entry.numel} stored: must be each once"
                )
            _add_corners(corners, (0,) * len(entry.shape), entry.shape, -1)
            if any(corners.values()):
                raise CheckpointError(
                    f"{name}: its boxes overlap: each element must be stored once"
                )

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
            chunks = [Chunk(tuple(o), tuple(s), file, key) for o, s, file, key in entry["boxes"]]
            if not all(_PLAIN_NAME.match(chunk.file) for chunk in chunks):
                raise ValueError(f"{name}: a file outside the folder")
            if any(
                type(number) is not int
                for chunk in chunks
                for number in (*chunk.offsets, *chunk.shape)
            ):
                raise ValueError(f"{name}: a box must be given by integers")
            if len(entry["shape"]) > _MOST_DIMS:
                raise ValueError(
                    f"{name}: {len(entry['shape'])} dims: must be at most {_MOST_DIMS}"
                )
            index.entries[name] = Entry(tuple(entry["shape"]), _dtype(entry["dtype"]), chunks)
        return index


def _add_corners(
    counts: dict[tuple[int, ...], int], offsets: tuple[int, ...], shape: tuple[int, ...], times: int
) -> None:
    """Counts a box's corners `times` over, with the sign that inclusion and exclusion give each. The sum of boxes'
    indicator functions is that of another box if and only if their counts are equal: n boxes take n steps."""
    ends = [(start, start + count) for start, count in zip(offsets, shape, strict=True)]
    for corner, sign in zip(itertools.product(*ends), _signs(len(shape)), strict=True):
        counts[corner] += sign * times


@functools.cache
def _signs(dims: int) -> tuple[int, ...]:
    return tuple(math.prod(signs) for signs in itertools.product((1, -1), repeat=dims))


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_flushed(path: Path, content: bytes) -> str:
    """Writes a small file to the disk itself; its SHA-256. Its name is durable once its folder is flushed."""
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(content))
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def write_all(descriptor: int, content: memoryview) -> None:
    """All of it: one call may take less, on a full disk or for a signal."""
    while content:
        content = content[os.write(descriptor, content) :]


def write_durably(path: Path, text: str) -> None:
    """Writes a small file as a whole: beside it, flushed, then renamed over it."""
    beside = path.with_name(f".{path.name}.partial")
    write_flushed(beside, text.encode())
    os.replace(beside, path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Makes names that were made or changed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Transaction:
    """One checkpoint on its way to disk: `begin`, files into `partial`, `publish`; `abandon` leaves no trace.

    state: what state.json will hold; carried: small files that go with the weights, by name. Called by one rank; the
    others only write into its `partial`, on a file system that all of them share. That has a name of its own: ranks of
    an earlier start that still write cannot get into it.
    """

    folder: Path
    state: dict[str, Any]
    carried: Mapping[str, bytes] = field(default_factory=dict)
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.partial = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(4)}.partial")

    def begin(self) -> None:
        """Makes the empty unpublished folder."""
        standing = next(path for path in self.partial.parents if path.exists())
        self.partial.mkdir(parents=True)
        for made in self.partial.parents:
            if made == standing:
                break
            flush_folder(made.parent)

    def publish(self, index: Index, digests: dict[str, str]) -> None:
        """Completes the folder and makes it visible by one rename. digests: of the files that lie in it, by name."""
        index.check_whole()
        if self.carried:
            (self.partial / CARRIED).mkdir()
            for name, content in self.carried.items():
                digests[f"{CARRIED}/{name}"] = write_flushed(self.partial / CARRIED / name, content)
            flush_folder(self.partial / CARRIED)
        for name, value in ((STATE, {"format": FORMAT, **self.state}), (INDEX, index.to_json())):
            digests[name] = write_flushed(self.partial / name, json.dumps(value, indent=1).encode())
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        own = hashlib.sha256(lines.encode()).hexdigest()
        write_flushed(self.partial / SUMS, f"{lines}{_OWN_SUM}{own}\n".encode())
        flush_folder(self.partial)
        if (
            self.folder.exists()
        ):  # one that was found damaged, or that a run which goes back writes again
            replaced = self.folder.with_name(f".{self.folder.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.folder, replaced)
            # A kill here leaves the old one, which `checkpoints_of` finds under this name.
            os.rename(self.partial, self.folder)
            flush_folder(self.folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(self.partial, self.folder)
            flush_folder(self.folder.parent)

    def abandon(self) -> None:
        """Removes what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def read_sums(folder: Path) -> dict[str, str]:
    """The file names of a checkpoint and their SHA-256. CheckpointError where SHA256SUMS is absent or damaged."""
    path = folder / SUMS
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: damaged: is not text") from None
    lines, mark, own = text.rpartition(_OWN_SUM)
    if not mark or own != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise CheckpointError(f"{path}: damaged: its lines do not have the SHA-256 that it states")
    sums = {
        name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())
    }
    for name in (STATE, INDEX, *sums):
        if not _LISTED_NAME.match(name) or name not in sums:
            raise CheckpointError(f"{path}: {name}: must be the plain name of a file that it lists")
    return sums


def check_file(folder: Path, name: str, digest: str) -> None:
    """CheckpointError, naming the file, where it is absent or has another SHA-256."""
    path = folder / name
    try:
        found = file_digest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if found != digest:
        raise CheckpointError(f"{path}: damaged: SHA-256 {found[:12]}… must be {digest[:12]}…")


def check_carried(folder: Path, sums: dict[str, str]) -> None:
    """CheckpointError where a file was put beside those that go with the weights: it would be read."""
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
    if name == STATE and value.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format: {value.get('format')!r}: must be {FORMAT}")
    return value
