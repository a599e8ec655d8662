"""Megatron's indexed format, version 1: `prefix.idx` says where each sequence lies in `prefix.bin`.

    prefix.idx   magic (9 bytes), version u64, dtype code u8, sequences N u64, document entries D u64,
                 sizes i32[N] (tokens), pointers i64[N] (bytes), document index i64[D] (sequences, a leading 0)
    prefix.bin   the tokens of all sequences, one after another, nothing between them

All little-endian; the index holds exactly 34 + 12·N + 8·D bytes. A corpus is therefore one flat run of
tokens with marks in it, and that is how it is read here: `read(a, b)`, or `tokens[a:b]` of a memory map. What is
damaged is refused (DataError with the file and the place), never read as if it were data. Next: indexed_writer.py,
then samples.py, which makes samples of these tokens.
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
    "is for floating point, and 6 and 7 are swapped between Megatron-LM and gpt-neox: no tokens"
)
_SMALL_VOCABULARY = 65_500  # below it tokens are u16, as in Megatron
AT_A_TIME = 1 << 20  # entries that are checked or written at a time


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The type that ids of a vocabulary are stored in, Megatron's choice: u16 below 65,500, else i32."""
    return np.dtype(np.uint16 if vocabulary_size < _SMALL_VOCABULARY else np.int32)


def files_of(prefix: str | Path) -> tuple[Path, Path]:
    """(`prefix.idx`, `prefix.bin`)"""
    return Path(f"{prefix}.idx"), Path(f"{prefix}.bin")


def marks_prefix(prefix: str | Path) -> str:
    """The prefix of the corpus that marks with 1, token by token, what the loss counts of another."""
    return f"{prefix}.mask"


def labels_prefix(prefix: str | Path) -> str:
    """The prefix of the corpus that holds, token by token, the number of the label of the text of another. The names
    of the labels are in `names_file`."""
    return f"{prefix}.label"


def names_file(prefix: str | Path) -> Path:
    """The JSON file with the names of a corpus's labels, in the order of their numbers: {"classes": [...]}."""
    return Path(f"{prefix}.label.json")


def _opened(path: Path) -> tuple[FileIO, int]:
    """A file and its bytes. Raises DataError where it cannot be read or is empty."""
    try:
        file = FileIO(path)
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if size == 0:
        raise DataError(f"{path}: is empty: must hold an indexed corpus")
    return file, size


def _mapped(file: FileIO, path: Path, size: int) -> mmap.mmap:
    """A file as read-only memory. Raises DataError where it is not as long any more, or cannot be mapped."""
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


class IndexedCorpus:
    """A corpus opened for reading. Opening costs the same at any size; `check_index` reads the index once.

    `sizes`, `pointers` and `document_index` are views of the file and not aligned in memory: index and
    slice them, but do not give them whole to NumPy functions that would copy them (`searchsorted`).
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a prefix. Raises DataError where a file is absent or header and sizes do not agree."""
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
                f"{self._bytes} bytes are no whole number of {self.dtype} tokens of the index",
            )
        self._check_ends()

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, as a memory map: for programs that read a corpus through. A process that touches what was cut
        off the file meanwhile ends by SIGBUS, so a run takes `read`."""
        return np.frombuffer(_mapped(self._file, self.tokens_path, self._bytes), self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop), in memory of their own. Raises DataError where the file does not hold them any
        more."""
        place, end, content = start * self.dtype.itemsize, stop * self.dtype.itemsize, b""
        try:
            while missing := end - place - len(content):
                part = os.pread(self._file.fileno(), missing, place + len(content))
                if not part:
                    raise self._changed(
                        self.tokens_path, os.fstat(self._file.fileno()).st_size, self._bytes
                    )
                content = content + part if content else part
        except OSError as error:
            raise DataError(f"{self.tokens_path}: cannot be read: {error.strerror}") from None
        return np.frombuffer(content, self.dtype)

    def check_unchanged(self) -> None:
        """Raises DataError where a file is not as long as when it was opened. A run asks before it looks into the
        index, whose lost pages would end it by SIGBUS."""
        if (size := self._index.size()) != len(self._index):
            raise self._changed(self.index_path, size, len(self._index))
        if (size := os.fstat(self._file.fileno()).st_size) != self._bytes:
            raise self._changed(self.tokens_path, size, self._bytes)

    def _changed(self, path: Path, size: int, before: int) -> DataError:
        return DataError(
            f"{path}: {size} bytes, {before} when it was opened: must not change under a run"
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the corpus."""
        return self._bytes // self.dtype.itemsize

    @property
    def num_sequences(self) -> int:
        """Sequences: what has a size and a pointer. A document is one or more of them."""
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_index) - 1

    def sequence(self, index: int) -> np.ndarray:
        """The tokens of one sequence, a view of the file."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, a view of the file."""
        return self.tokens[self.document_start(index) : self.document_start(index + 1)]

    def document_start(self, index: int) -> int:
        """The place of a document's first token; of `num_documents`: the end of the corpus."""
        sequence = int(self.document_index[index])
        return self.sequence_start(sequence)

    def document_lengths(self, start: int, stop: int) -> np.ndarray:
        """Tokens of documents [start, stop), int64."""
        entries = self.document_index[start : stop + 1].astype(np.int64)
        places = np.full(len(entries), self.num_tokens, np.int64)
        inside = entries < self.num_sequences
        places[inside] = self.pointers[entries[inside]] // self.dtype.itemsize
        return np.diff(places)

    def sequence_start(self, index: int) -> int:
        """The place of a sequence's first token; of `num_sequences`: the end of the corpus."""
        if index == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[index]) // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds the token at a place of the corpus."""
        # Bisect: the last document that starts at or before `token`.
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
        """The places in (start, stop) at which a document begins."""
        places, document = [], self.document_at(start) + 1
        while document < self.num_documents and (place := self.document_start(document)) < stop:
            # An empty document begins nothing.
            if place > start and (not places or place > places[-1]):
                places.append(place)
            document += 1
        return places

    def _refuse(self, path: Path, reason: str) -> None:
        raise DataError(f"{path}: {reason}: damaged, or not the pair of its .bin and .idx")

    def _read_header(self, index: mmap.mmap) -> tuple[np.dtype[Any], int, int]:
        path = self.index_path
        if len(index) < HEADER_BYTES:
            raise DataError(
                f"{path}: {len(index)} bytes: an index begins with a header of {HEADER_BYTES}"
            )
        if index[:9] != MAGIC:
            raise DataError(
                f"{path}: byte 0: begins with {index[:9]!r}, must be {MAGIC!r}: not an index"
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
                f"holds {len(index)} bytes, must be {expected} for {sequences} sequences and {documents} "
                "document entries (bytes 18 to 33)",
            )
        if sequences == 0 or documents < 2:
            raise DataError(
                f"{path}: byte 18: {sequences} sequences, {documents} document entries: no data"
            )
        return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents

    def _check_ends(self) -> None:
        """What can be known of the arrays without reading them: their first and last entries."""
        last, size, width = int(self.pointers[-1]), int(self.sizes[-1]), self.dtype.itemsize
        total = self.num_tokens * width
        if size < 0 or last + size * width != total:
            self._refuse(
                self.tokens_path,
                f"holds {total} bytes, but by {self.index_path} its last sequence of {size} tokens of {width} "
                f"bytes begins at {last}",
            )
        first, end = int(self.document_index[0]), int(self.document_index[-1])
        if first != 0 or end != self.num_sequences:
            self._refuse(
                self.index_path,
                f"the document index goes from {first} to {end}, must be 0 to {self.num_sequences}",
            )

    def index_sha256(self) -> str:
        """Of the whole index file."""
        return hashlib.sha256(self._index).hexdigest()

    def check_index(self) -> None:
        """Read the whole index and compare each entry with the next. Raises DataError with the first place.

        With as many documents as sequences, each document must be one sequence: otherwise one would be
        empty, another double, and a flipped bit is likelier than that.
        """
        self._check_sequences()
        self._check_documents()

    def _check_sequences(self) -> None:
        """No size is negative, and each sequence begins where the sizes before it end."""
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
                place = base + 4 * self.num_sequences + 8 * entry
                self._refuse(
                    self.index_path,
                    f"byte {place}: sequence {entry} begins at byte {pointers[bad[0]]}, must be {begins[bad[0]]} by "
                    "the sizes before it",
                )
            expected = int(ends[-1])

    def _check_documents(self) -> None:
        """Each document entry is at least the one before it."""
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
