"""Streams documents from text files: .jsonl, .txt, .parquet, the first two also as .gz or .zst, or standard input.

There are two steps, so that several processes can share the work. The reading process cuts a stream into chunks of
whole lines without parsing them (`read_chunks`); any process parses a chunk into documents (`parse`). A chunk records
where the next one begins, which is all that is needed to resume after a kill.
Memory: one chunk, or the largest document if that is larger. A .txt file that is a single document is read in pieces;
a line or paragraph that does not end within a limit is an error.
"""

import gzip
import importlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megalite.errors import DataError
from megalite.inputs import reading

Kind = Literal["jsonl", "txt", "paragraphs", "parquet"]
STANDARD_INPUT = "-"
CHUNK_BYTES = 1 << 19
_BLOCK_BYTES = 1 << 16  # read from a compressed file at a time
_SLICE_BYTES = 1 << 8  # decompressed at a time: zstd can expand a byte to 32 KB
_ROWS = 256  # rows of a .parquet file per chunk
_WHOLE_BYTES = 1 << 22  # a .txt file up to this size is a single piece
_LARGEST_PARAGRAPH = 1 << 26
_LARGEST_LINE = 1 << 28
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".md": "txt",
    ".parquet": "parquet",
}
_GAP = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")  # blank lines
_BOM = b"\xef\xbb\xbf"


class InputPosition(NamedTuple):
    """Where a chunk begins. input: index of the input; offset: byte in its text, or row of a .parquet file; number: of
    the next line, row or document, from 1."""

    input: int = 0
    offset: int = 0
    number: int = 1


@dataclass(frozen=True)
class TextChunk:
    """Some whole documents, not parsed yet, or a piece of a document that continues in the next chunk (`open_end`)."""

    kind: Kind
    start: InputPosition
    end: InputPosition
    data: Any  # bytes; for a .parquet file a list of strings or None
    read_bytes: int  # bytes of the input's file read so far, for the progress
    open_end: bool = False


class Bad(NamedTuple):
    """A line, row or document that cannot be used: its number in the file, and the reason."""

    number: int
    reason: str


def kind_of(
    path: str, given: Literal["jsonl", "txt", "parquet"] | None = None, paragraphs: bool = False
) -> Kind:
    """The format of an input: `given`, else by its name; standard input is JSON lines. paragraphs: whether blank lines
    separate the documents of a .txt file. Raises DataError if the name does not tell the format."""
    unpacked = path.removesuffix(".gz").removesuffix(".zst")
    by_name = _SUFFIXES.get(Path(unpacked).suffix.lower())
    kind = given or ("jsonl" if path == STANDARD_INPUT else by_name)
    if kind is None:
        raise DataError(
            f"{path}: must end in .jsonl, .txt or .parquet (optionally with .gz or .zst), or --format must be given"
        )
    return "paragraphs" if kind == "txt" and paragraphs else kind


def read_chunks(
    inputs: Sequence[str], kinds: Sequence[Kind], text_key: str, start: InputPosition
) -> Iterator[TextChunk]:
    """The chunks of all inputs from `start` on. Raises DataError for a file that cannot be read or whose compressed
    data is truncated."""
    for number, (path, kind) in enumerate(zip(inputs, kinds, strict=True)):
        if number < start.input:
            continue
        begin = start if number == start.input else InputPosition(number)
        with reading(path, DataError):
            if kind == "parquet":
                yield from _parquet_chunks(path, text_key, begin)
                continue
            try:
                with _ByteStream(path, begin.offset) as stream:
                    if kind == "txt":
                        yield from _whole_chunks(stream, begin)
                    else:
                        yield from _line_chunks(stream, kind, begin)
            except (EOFError, zlib.error) as error:
                raise DataError(f"{path}: is damaged: {error}") from None


def parse(chunk: TextChunk, text_key: str) -> Iterator[str | Bad]:
    """The documents of a chunk in order, with a Bad for each that cannot be used; blank lines are skipped."""
    data, number = chunk.data, chunk.start.number
    mark = _BOM if chunk.start.offset == 0 else b""
    if chunk.kind == "jsonl":
        yield from (text_of(found, text_key, row) for row, found in parse_objects(chunk))
    elif chunk.kind == "parquet":
        missing = f"{json.dumps(text_key)} is not a string"
        for row, text in enumerate(data, number):
            yield Bad(row, missing) if text is None else text
    elif chunk.kind == "paragraphs":
        for row, part in enumerate(filter(bytes.strip, _GAP.split(data)), number):
            yield _decoded(part.strip(b"\r\n").removeprefix(mark), row)
    else:
        yield _decoded(data.removeprefix(mark), number)


def read_texts(
    inputs: Sequence[str], text_key: str = "text", on_bad: Callable[[str], None] = lambda line: None
) -> Iterator[str]:
    """The documents of some inputs one after another; each that cannot be used is passed to `on_bad` as one line."""
    for chunk in read_chunks(inputs, [kind_of(path) for path in inputs], text_key, InputPosition()):
        for found in parse(chunk, text_key):
            if isinstance(found, Bad):
                on_bad(f"{inputs[chunk.start.input]}:{found.number}: {found.reason}")
            else:
                yield found


def parse_objects(chunk: TextChunk) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """The objects of a chunk of JSON lines, with their line numbers."""
    data = chunk.data
    if chunk.start.offset == 0 and data.startswith(_BOM):
        data = data[len(_BOM) :]
    for number, line in enumerate(data.split(b"\n"), chunk.start.number):
        if line.strip():
            yield number, _json_object(line, number)


def _json_object(line: bytes, number: int) -> dict[str, Any] | Bad:
    try:
        value = json.loads(line.decode("utf-8"))
        # JSON can escape half of a surrogate pair, which no tokenizer accepts.
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(number, f"is not UTF-8 (byte {error.start})")
    except UnicodeEncodeError:
        return Bad(number, "holds half of a surrogate pair")
    except (ValueError, RecursionError) as error:
        return Bad(number, f"is not JSON: {getattr(error, 'msg', 'nested too deeply')}")
    return value if isinstance(value, dict) else Bad(number, "is not a JSON object")


def text_of(found: dict[str, Any] | Bad, text_key: str, number: int) -> str | Bad:
    """The text of a line's object. number: of the line."""
    if isinstance(found, Bad):
        return found
    if text_key not in found:
        return Bad(number, f"has no key {json.dumps(text_key)}")
    text = found[text_key]
    return text if isinstance(text, str) else Bad(number, f"{json.dumps(text_key)} is not a string")


def _decoded(data: bytes, number: int) -> str | Bad:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Bad(number, f"is not UTF-8 (byte {error.start} of the document)")


class _ByteStream:
    """The text of a file as decompressed blocks of bytes, and the number of bytes read from the file."""

    def __init__(self, path: str, offset: int) -> None:
        self._raw = sys.stdin.buffer if path == STANDARD_INPUT else open(path, "rb")  # noqa: SIM115
        self.path, self._offset = path, offset

    @property
    def read_bytes(self) -> int:
        """Bytes of the file read so far; 0 for standard input."""
        return 0 if self.path == STANDARD_INPUT else self._raw.tell()

    def blocks(self) -> Iterator[bytes]:
        """The text from the offset on, in blocks."""
        skip = self._offset
        if skip and not self.path.endswith((".gz", ".zst")):
            self._raw.seek(skip)
            skip = 0
        for block in self._unpacked():
            if skip >= len(block):
                skip -= len(block)
                continue
            yield block[skip:]
            skip = 0

    def __enter__(self) -> "_ByteStream":
        return self

    def __exit__(self, *error: object) -> None:
        if self.path != STANDARD_INPUT:
            self._raw.close()

    def _unpacked(self) -> Iterator[bytes]:
        if self.path.endswith(".gz"):
            with gzip.GzipFile(fileobj=self._raw) as file:
                while block := file.read(CHUNK_BYTES):
                    yield block
        elif self.path.endswith(".zst"):
            yield from self._unpacked_zst()
        else:
            while block := self._raw.read(CHUNK_BYTES):
                yield block

    def _unpacked_zst(self) -> Iterator[bytes]:
        """Decompresses frame by frame: the library's own reader does not detect a file that ends inside a frame."""
        zstandard = _library("zstandard", self.path)
        frame = None
        while read := self._raw.read(_BLOCK_BYTES):
            unpacked = bytearray()
            while read:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                part, read = read[:_SLICE_BYTES], read[_SLICE_BYTES:]
                try:
                    unpacked += frame.decompress(part)
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                if frame.eof:
                    read, frame = frame.unused_data + read, None
                if len(unpacked) > CHUNK_BYTES:
                    yield bytes(unpacked)
                    unpacked.clear()
            yield bytes(unpacked)
        if frame is not None:
            raise EOFError("Compressed file ended before the end of its last frame")


def _line_chunks(stream: _ByteStream, kind: Kind, place: InputPosition) -> Iterator[TextChunk]:
    """Chunks that end at the end of a line, or for `paragraphs` at blank lines."""
    parts: list[bytes] = []
    for block in stream.blocks():
        if kind == "jsonl":
            cut = block.rfind(b"\n") + 1
        else:  # a gap may span two blocks
            block = b"".join([*parts, block])
            parts, cut = [], _last_gap(block)
            if cut == 0 and len(block) > _LARGEST_PARAGRAPH:
                size = _LARGEST_PARAGRAPH >> 20
                raise DataError(
                    f"{stream.path}: byte {place.offset}: no blank line in the next {size} MiB"
                )
        if cut == 0:
            parts.append(block)
            if sum(map(len, parts)) > _LARGEST_LINE:
                rule = f"does not end within {_LARGEST_LINE >> 20} MiB: must be lines of JSON"
                raise DataError(f"{stream.path}: line {place.number}: {rule}")
            continue
        data = b"".join([*parts, block[:cut]])
        parts = [block[cut:]]
        chunk = _chunk(kind, place, data, stream.read_bytes)
        place = chunk.end
        yield chunk
    if rest := b"".join(parts):
        yield _chunk(kind, place, rest, stream.read_bytes)


def _last_gap(block: bytes) -> int:
    """The end of the last blank lines of a block that are followed by text; 0 if there are none."""
    ends = [found.end() for found in _GAP.finditer(block)]
    while ends and not block[ends[-1] :].strip():
        ends.pop()
    return ends[-1] if ends else 0


def _chunk(kind: Kind, place: InputPosition, data: bytes, read_bytes: int) -> TextChunk:
    count = data.count(b"\n")
    if kind == "paragraphs":
        count = sum(1 for part in _GAP.split(data) if part.strip())
    end = InputPosition(place.input, place.offset + len(data), place.number + count)
    return TextChunk(kind, place, end, data, read_bytes)


def _whole_chunks(stream: _ByteStream, place: InputPosition) -> Iterator[TextChunk]:
    """A file as one document: a single piece, or for a larger file several pieces cut at a newline or space."""
    rest = b""
    for block in stream.blocks():
        rest += block
        if len(rest) > _WHOLE_BYTES:
            cut = max(rest.rfind(b"\n", 0, -1), rest.rfind(b" ", 0, -1)) + 1 or _character_start(
                rest
            )
            end = InputPosition(place.input, place.offset + cut, place.number)
            yield TextChunk("txt", place, end, rest[:cut], stream.read_bytes, open_end=True)
            place, rest = end, rest[cut:]
    if rest:
        end = InputPosition(place.input, place.offset + len(rest), place.number + 1)
        yield TextChunk("txt", place, end, rest, stream.read_bytes)


def _character_start(data: bytes) -> int:
    """The index at which the last UTF-8 character begins."""
    place = len(data) - 1
    while place > len(data) - 4 and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _parquet_chunks(path: str, column: str, place: InputPosition) -> Iterator[TextChunk]:
    pyarrow, parquet = _library("pyarrow", path), _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: is not a .parquet file: {str(error).splitlines()[0]}") from None
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{path}: has no column {json.dumps(column)} (--text-key); it has {names}")
    kind = str(file.schema_arrow.field(column).type)
    if kind not in ("string", "large_string"):
        raise DataError(f"{path}: column {json.dumps(column)} is of type {kind}, must be string")
    size, total, row = os.path.getsize(path), max(1, file.metadata.num_rows), 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row + rows <= place.offset:
            row += rows
            continue
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[column]):
                texts = _values(batch.column(0))[max(0, place.offset - row) :]
                row += batch.num_rows
                if texts:
                    first = row - len(texts)
                    start = InputPosition(place.input, first, first + 1)
                    end = InputPosition(place.input, row, row + 1)
                    yield TextChunk("parquet", start, end, texts, size * row // total)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path}: is damaged: {str(error).splitlines()[0]}") from None


def _values(column: Any) -> list[str | None]:
    """The strings of a column; None for those that are not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> str | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _library(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{path}: needs {name.split('.')[0]}: pip install 'megalite[data]'"
        ) from None


def total_bytes(inputs: Iterable[str]) -> int | None:
    """The size of all inputs on disk; None if one is standard input. Raises DataError if one does not exist."""
    total = 0
    for path in inputs:
        if path == STANDARD_INPUT:
            return None
        if not os.path.isfile(path):
            raise DataError(f"{path}: {'is a folder' if os.path.isdir(path) else 'no such file'}")
        total += os.path.getsize(path)
    return total
