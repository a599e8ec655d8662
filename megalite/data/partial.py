"""A corpus that is being written: `PREFIX.partial/`, until it is complete and renamed.

The folder contains the tokens and sizes so far, and a journal, which records how far the input has been read and how
long the files were then. After a kill, the same command truncates the files to the lengths in the journal and resumes,
so the output is byte-identical to that of an uninterrupted run.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.corpus_check import checksum_file, checksum_lines
from megalite.data.documents import Bad, InputPosition, TextChunk
from megalite.data.indexed import files_of, names_file
from megalite.data.indexed_writer import refuse_existing, write_index
from megalite.errors import DataError

_JOURNAL_SECONDS = 5.0
_NAMES = "classes.json"
_NAMED = 10  # bad lines that are named; the rest are only counted
_LONGEST_DOCUMENT = 2**31 - 1  # tokens: sizes are i32


@dataclass
class Counts:
    """Counts of the input processed so far."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    """The first bad lines: file, line and reason."""
    forms: dict[str, int] = field(default_factory=dict)
    """Number of lines by form, if there are several forms (chat_forms.py)."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one chunk. sizes: of its documents in order, the last of which may continue in the next chunk;
    marks: one byte per token, or empty if the corpus has no marks."""

    sizes: np.ndarray
    tokens: bytes
    marks: bytes
    empty: int
    bad: list[Bad]
    forms: Mapping[str, int] = field(default_factory=dict)
    """Number of lines by form, as in Counts."""


class Partial:
    """`PREFIX.partial/`: tokens and sizes so far, and the journal."""

    def __init__(
        self,
        output: str | Path,
        fingerprint: str,
        overwrite: bool,
        marks: str | None,
        classes: Sequence[str],
    ) -> None:
        """Opens or creates the folder. marks: prefix of a corpus of marks for the tokens, None if there is none;
        classes: names of the labels, written along with it. Raises DataError if the output exists, another process is
        writing it, or it was written with other arguments."""
        self.output, self.fingerprint = Path(output), fingerprint
        self.folder = Path(f"{output}.partial")
        self._journal = self.folder / "journal.json"
        self.place, self.counts, self.written = InputPosition(), Counts(), False
        self._open_tokens = 0  # tokens so far of a document that continues in the next chunk
        self._saved = time.monotonic()
        state = self._read_journal()
        self._prefixes = {"tokens": str(output)} | ({} if marks is None else {"marks": marks})
        self._classes = list(classes)
        if not overwrite and not state.get("written"):
            for prefix in self._prefixes.values():
                refuse_existing(prefix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the end)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.folder}: another process is writing to it") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from None
        if state and state["fingerprint"] != fingerprint:
            if not overwrite:
                raise DataError(
                    f"{self.folder}: was written with other inputs, options or tokenizer: remove it or use --overwrite"
                )
            state = {}
        if state:
            self.place, self.counts = InputPosition(*state["place"]), Counts(**state["counts"])
            self.written, self._open_tokens = state["written"], state["open_tokens"]
        names = [] if self.written else ["sizes.i32", *(f"{name}.bin" for name in self._prefixes)]
        self._files = {name: self._open(name, state) for name in names}

    def _read_journal(self) -> dict[str, Any]:
        try:
            return json.loads(self._journal.read_text())
        except (OSError, ValueError):
            return {}

    def _open(self, name: str, state: dict[str, Any]) -> BinaryIO:
        """A file of the folder, truncated to its length in the journal and opened for appending."""
        path = self.folder / name
        path.touch()
        os.truncate(path, state.get(name, 0))
        return open(path, "ab")

    def add(self, chunk: TextChunk, encoded: Encoded, path: str, strict: bool) -> None:
        """Appends the next chunk. Raises DataError for a bad line if `strict`."""
        for bad in encoded.bad:
            line = f"{path}:{bad.number}: {bad.reason}"
            if strict:
                self.discard()
                raise DataError(f"{line} (--strict)")
            self.counts.bad += 1
            if len(self.counts.named) < _NAMED:
                self.counts.named.append(line)
        sizes = encoded.sizes.tolist()
        self._files["tokens.bin"].write(encoded.tokens)
        if encoded.marks:
            self._files["marks.bin"].write(encoded.marks)
        self.counts.tokens += sum(sizes)
        # A document may span several chunks: its size is written at its end.
        if self._open_tokens and sizes:
            sizes[0] += self._open_tokens
        elif self._open_tokens and not chunk.open_end:
            sizes = [self._open_tokens]
        if not chunk.open_end:
            self._open_tokens = 0
        elif sizes:
            self._open_tokens = sizes.pop()
        if max([self._open_tokens, *sizes]) > _LONGEST_DOCUMENT:
            raise DataError(
                f"{path}:{chunk.start.number}: document too long: must have at most {_LONGEST_DOCUMENT} tokens"
            )
        self._files["sizes.i32"].write(np.array(sizes, "<i4").tobytes())
        self.counts.documents += len(sizes)
        self.counts.empty += encoded.empty
        for form, count in encoded.forms.items():
            self.counts.forms[form] = self.counts.forms.get(form, 0) + count
        self.place = chunk.end
        if time.monotonic() - self._saved > _JOURNAL_SECONDS:
            self.save()

    def save(self) -> None:
        """Flushes all files to disk and then records their lengths in the journal."""
        state = {
            "fingerprint": self.fingerprint,
            "place": self.place,
            "counts": asdict(self.counts),
        }
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            state[name] = file.tell()
        state |= {"written": self.written, "open_tokens": self._open_tokens}
        partial = self._journal.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, self._journal)
        self._saved = time.monotonic()

    def finish(self, dtype: np.dtype[Any]) -> None:
        """Writes the index and the checksums. Raises DataError if there was no document."""
        self.save()
        if self.counts.documents == 0:
            self.discard()
            raise DataError(
                f"{self.output}: nothing to write: no document in the inputs, {self.counts.bad} bad lines",
                *(f"bad line: {line}" for line in self.counts.named),
            )
        sizes = np.memmap(self.folder / "sizes.i32", "<i4", "r")
        for name, prefix in self._prefixes.items():
            index, tokens = self.folder / f"{name}.idx", self.folder / f"{name}.bin"
            write_index(index, dtype if name == "tokens" else np.dtype(np.uint8), sizes, None)
            sums = checksum_lines(dict(zip(files_of(prefix), (index, tokens), strict=True)))
            (self.folder / f"{name}.sha256").write_text(sums)
        if self._classes:
            names = json.dumps({"classes": self._classes}, ensure_ascii=False)
            (self.folder / _NAMES).write_text(f"{names}\n", encoding="utf-8")
        self.written = True
        self.save()

    def give_names(self) -> None:
        """Moves the files to their final names. Each index comes after its tokens, and the corpus's own index last, so
        that a corpus with an index is complete. If this is interrupted, the same command finishes it."""
        if (self.folder / _NAMES).exists():
            os.replace(self.folder / _NAMES, names_file(self.output))
        for name, prefix in reversed(self._prefixes.items()):
            index, tokens = files_of(prefix)
            if (self.folder / f"{name}.bin").exists():
                index.unlink(missing_ok=True)
            for source, path in (
                (".bin", tokens),
                (".sha256", checksum_file(prefix)),
                (".idx", index),
            ):
                if (self.folder / f"{name}{source}").exists():
                    os.replace(self.folder / f"{name}{source}", path)
        shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Removes the folder: with these inputs and options it cannot be resumed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self.written and self.folder.exists():
            with contextlib.suppress(OSError):  # the disk may have failed
                self.save()
        for file in (*self._files.values(), self._lock):
            file.close()
