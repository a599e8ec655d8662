"""Writes corpora in Megatron's indexed format, which indexed.py describes and reads. Next: samples.py."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.indexed import AT_A_TIME, CODES, MAGIC, IndexedCorpus, files_of
from megalite.errors import DataError


class IndexedWriter:
    """Writes a corpus document by document. The files get their names when the corpus is complete, at the end of a
    `with` block or by `finish`; an error in the block leaves no files behind.

        with IndexedWriter("corpus", np.uint16) as writer:
            writer.add_document([5, 6, 7])
    """

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        """Raises DataError if a file of the prefix exists."""
        self.prefix, self.dtype = str(prefix), np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"tokens cannot be stored as {self.dtype}")
        refuse_existing(self.prefix)
        self._sizes: list[np.ndarray] = []
        self._documents: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._sequences = 0
        self._partial = [Path(f"{path}.partial") for path in files_of(prefix)]
        self._file: BinaryIO = _create(self._partial[1])

    def add_document(
        self, tokens: Sequence[int] | np.ndarray, sizes: Sequence[int] | None = None
    ) -> None:
        """Appends one document; `sizes` divides it into sequences. Raises DataError for an id that does not fit the
        dtype."""
        array = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if array.size:
            least, most = int(array.min()), int(array.max())
            if least < limits.min or most > limits.max:
                wrong = most if most > limits.max else least
                raise DataError(f"{self.prefix}: token id {wrong}: does not fit {self.dtype}")
        lengths = np.asarray([array.size] if sizes is None else sizes, np.int32)
        if int(lengths.sum()) != array.size:
            raise ValueError(f"sizes of {int(lengths.sum())} tokens for a document of {array.size}")
        self._file.write(array.astype(self.dtype.newbyteorder("<")).tobytes())
        self._add(lengths, np.array([len(lengths)], np.int64))

    def add_corpus(self, prefix: str | Path) -> None:
        """Appends all documents of another corpus with the same dtype."""
        other = IndexedCorpus(prefix)
        other.check_index()
        if other.dtype != self.dtype:
            raise DataError(
                f"{other.index_path}: its tokens are {other.dtype}: must be {self.dtype}, as in the output"
            )
        for start in range(0, other.num_tokens, AT_A_TIME):
            self._file.write(other.tokens[start : start + AT_A_TIME].tobytes())
        self._add(np.array(other.sizes), np.array(other.document_index[1:]))

    def _add(self, sizes: np.ndarray, document_ends: np.ndarray) -> None:
        self._sizes.append(sizes)
        self._documents.append(document_ends + self._sequences)
        self._sequences += len(sizes)

    def finish(self) -> None:
        """Writes the index and gives both files their names."""
        _sync(self._file)
        self._file.close()
        sizes = np.concatenate([np.zeros(0, np.int32), *self._sizes])
        write_index(self._partial[0], self.dtype, sizes, np.concatenate(self._documents))
        for partial, path in zip(
            reversed(self._partial), reversed(files_of(self.prefix)), strict=True
        ):
            os.replace(partial, path)  # the index last: a corpus with an index is complete

    def discard(self) -> None:
        """Removes the unfinished files."""
        self._file.close()
        for partial in self._partial:
            partial.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def refuse_existing(prefix: str) -> None:
    """Raises DataError if `prefix.idx` or `prefix.bin` exists, or if the prefix ends like a folder, without a name."""
    if os.path.basename(prefix) in ("", ".", ".."):
        folder = prefix.rstrip("/")
        raise DataError(f"{prefix}: is a folder: must be a prefix, such as {folder}/train")
    for path in files_of(prefix):
        if path.exists():
            raise DataError(f"{path}: already exists; choose another output or remove it")


def _create(path: Path) -> BinaryIO:
    """Creates a file for writing, with its folder. Raises DataError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def _sync(file: BinaryIO) -> None:
    """Waits until a file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_index(
    path: Path, dtype: np.dtype[Any], sizes: np.ndarray, documents: np.ndarray | None
) -> None:
    """Writes `prefix.idx` in parts, since the arrays may be memory maps.

    sizes: i32 [N], tokens of each sequence; documents: i64 [D], or None if each sequence is a document.
    """
    entries = len(sizes) + 1 if documents is None else len(documents)
    with _create(path) as file:
        file.write(
            MAGIC + struct.pack("<QBQQ", 1, CODES[dtype.newbyteorder("=")], len(sizes), entries)
        )
        for part in _parts(sizes):
            file.write(part.astype("<i4").tobytes())
        begin = 0
        for part in _parts(sizes):
            ends = begin + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            begin = int(ends[-1])
        for start in range(0, entries, AT_A_TIME):
            stop = min(start + AT_A_TIME, entries)
            part = np.arange(start, stop) if documents is None else documents[start:stop]
            file.write(part.astype("<i8").tobytes())
        _sync(file)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + AT_A_TIME] for start in range(0, len(array), AT_A_TIME))
