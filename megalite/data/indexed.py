"""Megatron's indexed format, version 1: `prefix.idx` has the position of each sequence in `prefix.bin`.

    prefix.idx   magic (9 bytes), version u64, dtype code u8, sequences N u64, document entries D u64,
                 sizes i32[N] (tokens), pointers i64[N] (bytes), document index i64[D] (sequences, a leading 0)
    prefix.bin   the tokens of all sequences, one after another, with nothing between them

All little-endian; the index has exactly 34 + 12·N + 8·D bytes. A corpus is therefore one flat array of tokens with
boundaries in it, and is read like that: `read(a, b)`, or `tokens[a:b]` of a memory map. A damaged file raises DataError
with the file and the position. Next: indexed_writer.py, then samples.py, which cuts these tokens into samples.
"""

import hashlib
import mmap
import os
import struct
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from megalite import other_formats
from megalite.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_FLOATS = (
    "is a floating-point type (Megatron-LM and gpt-neox swap 6 and 7), but tokens are integers"
)
_SMALL_VOCABULARY = 65_500  # below it tokens are u16, as in Megatron
AT_A_TIME = 1 << 20  # entries checked or written at a time


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The dtype in which a vocabulary's ids are stored, as in Megatron: u16 below 65,500 entries, else i32."""
    return np.dtype(np.uint16 if vocabulary_size < _SMALL_VOCABULARY else np.int32)


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """(`prefix.idx`, `prefix.bin`)"""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def marks_prefix(prefix: str | Path) -> str:
    """The prefix of the corpus of marks that belongs to a corpus: 1 for each token that counts in the loss, else 0."""
    return f"{prefix}.mask"


def labels_prefix(prefix: str | Path) -> str:
    """The prefix of the corpus of labels that belongs to a corpus: for each token the number of its text's label. The
    labels' names are in `names_file`."""
    return f"{prefix}.label"


def names_file(prefix: str | Path) -> Path:
    """The JSON file with the names of a corpus's labels, in the order of their numbers: {"classes": [...]}."""
    return Path(f"{prefix}.label.json")


def _opened(path: Path) -> tuple[FileIO, int]:
    """A file and its size in bytes. Raises DataError if it cannot be read or is empty."""
    try:
        file = FileIO(path)
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if size == 0:
        raise DataError(f"{path}: is empty: must contain an indexed corpus")
    return file, size


def _mapped(file: FileIO, path: Path, size: int) -> mmap.mmap:
    """A read-only memory map of a file. Raises DataError if the file has become shorter or cannot be mapped."""
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


class IndexedCorpus:
    """A corpus opened for reading. Opening costs the same at any size; `check_index` reads the index once.

    `sizes`, `pointers` and `document_index` are unaligned views of the file: index and slice them, but do not pass them
    whole to NumPy functions that would copy them (`searchsorted`).
    """

    def __init__(self, prefix: str | Path) -> None:
        """Opens a prefix. Raises DataError if a file is missing, or header and sizes disagree."""
        self.prefix = str(prefix)
        self.index_path, self.tokens_path = files_of(prefix)
        if not self.index_path.exists() and (found := other_formats.corpus(prefix)):
            raise DataError(f"{prefix}: {found}")
        file, size = _opened(self.index_path)
        with file:
            self._index = index = _mapped(file, self.index_path, size)
        self.dtype, sequences, documents = self._read_header(index)
        self.sizes = np.frombuffer(index, "<i4", sequences, HEADER_BYTES)
        self.pointers = np.frombuffer(index, "<i8", sequences, HEADER_BYTES + 4 * sequences)
        self.document_index = np.frombuffer(index, "<i8", documents, HEADER_BYTES + 12 * sequences)
        self._file, self._bytes = _opened(self.tokens_path)
        if self._bytes % self.dtype.itemsize:
            self._refuse(
                self.tokens_path,
                f"{self._bytes} bytes are not a whole number of {self.dtype} tokens, the index's dtype",
            )
        self._check_ends()

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, as a memory map, for programs that read whole corpora. If the file is truncated meanwhile, SIGBUS
        kills the process at the missing part; training therefore uses `read`."""
        return np.frombuffer(_mapped(self._file, self.tokens_path, self._bytes), self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of the tokens [start, stop). Raises DataError if the file no longer contains them."""
        offset, end, content = start * self.dtype.itemsize, stop * self.dtype.itemsize, b""
        try:
            while missing := end - offset - len(content):
                part = os.pread(self._file.fileno(), missing, offset + len(content))
                if not part:
                    raise self._changed(
                        self.tokens_path, os.fstat(self._file.fileno()).st_size, self._bytes
                    )
                content = content + part if content else part
        except OSError as error:
            raise DataError(f"{self.tokens_path}: cannot be read: {error.strerror}") from None
        return np.frombuffer(content, self.dtype)

    def check_unchanged(self) -> None:
        """Raises DataError if a file's size has changed since it was opened. Training checks this before it reads the
        index, whose missing pages would kill it by SIGBUS."""
        if (size := self._index.size()) != len(self._index):
            raise self._changed(self.index_path, size, len(self._index))
        if (size := os.fstat(self._file.fileno()).st_size) != self._bytes:
            raise self._changed(self.tokens_path, size, self._bytes)

    def _changed(self, path: Path, size: int, before: int) -> DataError:
        return DataError(
            f"{path}: has {size} bytes, had {before} when it was opened: must not change during a run"
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self._bytes // self.dtype.itemsize

    @property
    def num_sequences(self) -> int:
        """Number of sequences, which have a size and a pointer each. A document is one or more sequences."""
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_index) - 1

    def sequence(self, index: int) -> np.ndarray:
        """The tokens of one sequence, a view of the file."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, a view of the file."""
        return self.tokens[self.document_start(index) : self.document_start(index + 1)]

    def document_start(self, index: int) -> int:
        """The position of a document's first token; for `num_documents`, the end of the corpus."""
        sequence = int(self.document_index[index])
        return self.sequence_start(sequence)

    def document_lengths(self, start: int, stop: int) -> np.ndarray:
        """Numbers of tokens of the documents [start, stop), int64."""
        entries = self.document_index[start : stop + 1].astype(np.int64)
        positions = np.full(len(entries), self.num_tokens, np.int64)
        inside = entries < self.num_sequences
        positions[inside] = self.pointers[entries[inside]] // self.dtype.itemsize
        return np.diff(positions)

    def sequence_start(self, index: int) -> int:
        """The position of a sequence's first token; for `num_sequences`, the end of the corpus."""
        if index == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[index]) // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that contains the token at a position of the corpus."""
        # Bisection for the last document that starts at or before `token`.
        low = 0
        high = self.num_documents
        while high - low > 1:
            middle = (low + high) // 2
            if self.document_start(middle) <= token:
                low = middle
            else:
                high = middle
        return low

    def document_starts(self, start: int, stop: int) -> list[int]:
        """The positions in (start, stop) at which a document starts."""
        positions, document = [], self.document_at(start) + 1
        while document < self.num_documents and (position := self.document_start(document)) < stop:
            # Empty documents are skipped.
            if position > start and (not positions or position > positions[-1]):
                positions.append(position)
            document += 1
        return positions

    def _refuse(self, path: Path, reason: str) -> None:
        raise DataError(f"{path}: {reason}: damaged, or .bin and .idx do not belong together")

    def _read_header(self, index: mmap.mmap) -> tuple[np.dtype[Any], int, int]:
        path = self.index_path
        if len(index) < HEADER_BYTES:
            raise DataError(
                f"{path}: has {len(index)} bytes: an index starts with a header of {HEADER_BYTES} bytes"
            )
        if index[:9] != MAGIC:
            raise DataError(
                f"{path}: byte 0: starts with {index[:9]!r}: must be {MAGIC!r}: not an index"
            )
        version, code, sequences, documents = struct.unpack("<QBQQ", index[9:HEADER_BYTES])
        if version != 1:
            raise DataError(f"{path}: byte 9: version {version}: must be 1")
        if code not in DTYPES:
            reason = _FLOATS if code in (6, 7) else f"must be one of {', '.join(map(str, DTYPES))}"
            raise DataError(f"{path}: byte 17: dtype code {code}: {reason}")
        expected = HEADER_BYTES + 12 * sequences + 8 * documents
        if len(index) != expected:
            self._refuse(
                path,
                f"has {len(index)} bytes, must have {expected} for {sequences} sequences and {documents} "
                "document entries (bytes 18 to 33)",
            )
        if sequences == 0 or documents < 2:
            raise DataError(
                f"{path}: byte 18: {sequences} sequences, {documents} document entries: no data"
            )
        return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents

    def _check_ends(self) -> None:
        """Checks the first and last entries of the arrays, without reading them whole."""
        last, size, width = int(self.pointers[-1]), int(self.sizes[-1]), self.dtype.itemsize
        total = self.num_tokens * width
        if size < 0 or last + size * width != total:
            self._refuse(
                self.tokens_path,
                f"has {total} bytes, but according to {self.index_path} its last sequence, of {size} tokens of {width} "
                f"bytes, starts at {last}",
            )
        first, end = int(self.document_index[0]), int(self.document_index[-1])
        if first != 0 or end != self.num_sequences:
            self._refuse(
                self.index_path,
                f"the document index goes from {first} to {end}, must go from 0 to {self.num_sequences}",
            )

    def index_sha256(self) -> str:
        """SHA-256 of the whole index file."""
        return hashlib.sha256(self._index).hexdigest()

    def check_index(self) -> None:
        """Reads the whole index and compares each entry with the next. Raises DataError for the first mismatch.

        If there are as many documents as sequences, each document must be one sequence. Otherwise one document would be
        empty and another have two sequences, which is less likely than a flipped bit.
        """
        self._check_sequences()
        self._check_documents()

    def _check_sequences(self) -> None:
        """Checks that no size is negative, and that each sequence starts where the one before it ends."""
        width, base = self.dtype.itemsize, HEADER_BYTES
        expected = 0
        for start in range(0, self.num_sequences, AT_A_TIME):
            sizes = self.sizes[start : start + AT_A_TIME].astype(np.int64)
            pointers = self.pointers[start : start + AT_A_TIME]
            if (bad := np.flatnonzero(sizes < 0)).size:
                entry = start + int(bad[0])
                self._refuse(
                    self.index_path,
                    f"byte {base + 4 * entry}: sequence {entry} has {sizes[bad[0]]} tokens, must be 0 or more",
                )
            ends = expected + np.cumsum(sizes) * width
            begins = ends - sizes * width
            if (bad := np.flatnonzero(pointers != begins)).size:
                entry = start + int(bad[0])
                offset = base + 4 * self.num_sequences + 8 * entry
                self._refuse(
                    self.index_path,
                    f"byte {offset}: sequence {entry} starts at byte {pointers[bad[0]]}, must start at "
                    f"{begins[bad[0]]} by the sizes before it",
                )
            expected = int(ends[-1])

    def _check_documents(self) -> None:
        """Checks that the entries of the document index never decrease."""
        base = HEADER_BYTES + 12 * self.num_sequences
        single = self.num_documents == self.num_sequences
        rule = "one more than" if single else "at least"
        for start in range(0, self.num_documents, AT_A_TIME):
            entries = self.document_index[start : start + AT_A_TIME + 1].astype(np.int64)
            steps = np.diff(entries)
            wrong = steps != 1 if single else steps < 0
            if (bad := np.flatnonzero(wrong)).size:
                entry = start + int(bad[0]) + 1
                self._refuse(
                    self.index_path,
                    f"byte {base + 8 * entry}: document entry {entry} is {entries[bad[0] + 1]}, must be {rule} "
                    f"the {entries[bad[0]]} before it",
                )
