"""A safetensors file: written in one pass and flushed to disk; read in parts, which are compared with the index.

safetensors' own writer first copies all tensors, and the hash would need a second pass. Next: storage.py, which
decides what is written.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from megalite.checkpoint.folder import Entry, StoredBox, write_all
from megalite.errors import CheckpointError

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK_BYTES = 4 << 20
# Flush in the background after this many, so that little remains for the final fsync.
_FLUSH_BYTES = 64 << 20


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes the file, flushes it to disk, and returns the SHA-256 of the data in memory, so that corruption on the way
    to the disk is detected. A tensor on a GPU is copied to the CPU when its turn comes."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(2) as helpers:
        descriptor, unflushed = file.fileno(), 0
        flushing: Future[None] | None = None
        for block in _joined(_pieces(tensors)):
            # Concurrent with the write: both release the GIL.
            hashing = helpers.submit(digest.update, block)
            try:
                write_all(descriptor, block)
            finally:
                hashing.result()
            unflushed += len(block)
            if unflushed >= _FLUSH_BYTES and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()
                flushing, unflushed = helpers.submit(os.fdatasync, descriptor), 0
        if flushing is not None:
            flushing.result()
        os.fsync(descriptor)
    return digest.hexdigest()


def header_of(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The first bytes of a file (format: huggingface.co/docs/safetensors): the length of the header as u64, then the
    header as JSON, padded with spaces to 8 bytes. tensors: (name, dtype, shape) in the order of their data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file: header, then tensors in order."""
    shapes = ((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    yield memoryview(header_of(shapes))
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _joined(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes in blocks of up to _BLOCK_BYTES: small pieces are merged; large ones are cut, not copied."""
    small = bytearray()
    for piece in pieces:
        if small and len(small) + len(piece) > _BLOCK_BYTES:
            yield memoryview(small)
            small = bytearray()
        if len(piece) < _BLOCK_BYTES:
            small += piece
            continue
        for first in range(0, len(piece), _BLOCK_BYTES):
            yield piece[first : first + _BLOCK_BYTES]
    yield memoryview(small)


class TensorFiles:
    """Reads the boxes that an index lists in a folder's files; each file's header is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, _File] = {}

    def close(self) -> None:
        """Closes the files; a later read opens them again. A removed file occupies disk space until it is closed."""
        for opened in self._files.values():
            opened.file.close()
        self._files.clear()

    def read_into(
        self, target: Tensor, chunk: StoredBox, entry: Entry, part: tuple[slice, ...]
    ) -> None:
        """Reads part of a box into existing memory. Raises CheckpointError if the file cannot be read or does not match
        the index."""
        path = self.folder / chunk.file
        try:
            if chunk.file not in self._files:
                self._files[chunk.file] = _opened(path)
            file, data, size, header = self._files[chunk.file]
            start = data + _start(header[chunk.key], chunk, entry, size)
            start += chunk.run[1] * entry.dtype.itemsize if chunk.run is not None else 0
            row_bytes = torch.Size(chunk.shape[1:]).numel() * entry.dtype.itemsize
            first, count = part[0].start, part[0].stop - part[0].start
            # Read directly into the target if its layout allows, else in blocks through a buffer of the box's shape.
            alike = target.dtype == entry.dtype and target.shape[1:] == chunk.shape[1:]
            direct = target.device.type == "cpu" and target.is_contiguous() and alike
            step = count if direct else max(1, _BLOCK_BYTES // max(1, row_bytes))
            for i in range(0, count, step):
                rows = target.narrow(0, i, min(step, count - i))
                whole = rows
                if not direct:
                    whole = torch.empty((len(rows), *chunk.shape[1:]), dtype=entry.dtype)
                _read(file.fileno(), start + (first + i) * row_bytes, whole)
                if not direct:
                    rows.copy_(whole[(slice(None), *part[1:])])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


class _File(NamedTuple):
    """An open safetensors file: the offset and the bytes of its tensors, and its header. The size is looked up once: a
    rank of a large run reads thousands of boxes, and all ranks share the file system's metadata server."""

    file: BinaryIO
    data: int
    size: int
    header: dict[str, Any]


def _opened(path: Path) -> _File:
    """Opens a safetensors file and reads its header."""
    file = path.open("rb")
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size - 8 - length
    if size < 0:
        raise ValueError("is not a safetensors file: its header is longer than the file")
    return _File(file, 8 + length, size, json.loads(file.read(length)))


def _start(stored: dict[str, Any], chunk: StoredBox, entry: Entry, size: int) -> int:
    """The offset of a box in the file's tensor data of `size` bytes."""
    dtype, shape, (start, stop) = stored["dtype"], stored["shape"], stored["data_offsets"]
    wanted = chunk.shape if chunk.run is None else chunk.run[:1]
    if (dtype, tuple(shape)) != (_NAMES[entry.dtype], wanted):
        raise ValueError(
            f"{chunk.key}: {dtype} {shape}: must be {_NAMES[entry.dtype]} {list(wanted)} as in the index"
        )
    if not 0 <= start <= stop <= size or stop - start != math.prod(wanted) * entry.dtype.itemsize:
        rule = f"must match its shape and be within the {size} bytes of data"
        raise ValueError(f"{chunk.key}: data_offsets {start}, {stop}: {rule}")
    return start


def _read(descriptor: int, start: int, target: Tensor) -> None:
    """Fills a contiguous tensor from the file's bytes."""
    content: memoryview = target.detach().view(-1).view(torch.uint8).numpy().data
    while content:
        count = os.preadv(descriptor, [content], start)
        if count == 0:
            raise ValueError("the file is truncated")
        content, start = content[count:], start + count
