"""A corpus that is being written: `PREFIX.partial/`, until it is whole and gets its name.

The folder holds tokens and sizes so far and a journal, which says up to which place the input has been taken
in and how long the files were then. After a kill the files are cut back to the journal's word and the same
command resumes, so the result has the same bytes as one that was never stopped.
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
from megalite.data.documents import Bad, Chunk, Place
from megalite.data.indexed import files_of, names_file
from megalite.data.indexed_writer import refuse_existing, write_index
from megalite.errors import DataError

_JOURNAL_SECONDS = 5.0
_NAMES = "classes.json"
_NAMED = 10  # bad lines that are named; the rest are counted
_LONGEST_DOCUMENT = 2**31 - 1  # tokens: sizes are i32


@dataclass
class Counts:
    """What has been taken in so far."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)
    """The first bad lines: file, line and reason."""
    forms: dict[str, int] = field(default_factory=dict)
    """Lines by their form, where they may have several (chat_forms.py)."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of one chunk: of each document its size, one after another; the last one may continue in the next.
    `marks`: a byte a token, or nothing where the corpus has none."""

    sizes: np.ndarray
    tokens: bytes
    marks: bytes
    empty: int
    bad: list[Bad]
    forms: Mapping[str, int] = field(default_factory=dict)
    """Lines by their form, as of Counts."""


class Partial:
    """`PREFIX.partial/`: tokens and sizes so far, and the journal of how far that is."""

    def __init__(
        self,
        output: str | Path,
        fingerprint: str,
        overwrite: bool,
        marks: str | None,
        classes: Sequence[str],
    ) -> None:
        """Open or make it. marks: prefix of a corpus of marks beside the tokens, None: there is none; classes: names
        of what it marks, written beside it. Raises DataError where the output exists, another process works on it, or
        it was left by other arguments."""
        self.output, self.fingerprint = Path(output), fingerprint
        self.folder = Path(f"{output}.partial")
        self._journal = self.folder / "journal.json"
        self.place, self.counts, self.written = Place(), Counts(), False
        self._open_tokens = 0  # of the last document, where it continues
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
            raise DataError(f"{self.folder}: another process is writing it") from None
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written: {error.strerror}") from None
        if state and state["fingerprint"] != fingerprint:
            if not overwrite:
                raise DataError(
                    f"{self.folder}: left by other inputs, options or tokenizer: remove it, or say --overwrite"
                )
            state = {}
        if state:
            self.place, self.counts = Place(*state["place"]), Counts(**state["counts"])
            self.written, self._open_tokens = state["written"], state["open_tokens"]
        names = [] if self.written else ["sizes.i32", *(f"{name}.bin" for name in self._prefixes)]
        self._files = {name: self._open(name, state) for name in names}

    def _read_journal(self) -> dict[str, Any]:
        try:
            return json.loads(self._journal.read_text())
        except (OSError, ValueError):
            return {}

    def _open(self, name: str, state: dict[str, Any]) -> BinaryIO:
        """A file of the folder, cut to what the journal vouches for, to be written on."""
        path = self.folder / name
        path.touch()
        os.truncate(path, state.get(name, 0))
        return open(path, "ab")

    def add(self, chunk: Chunk, encoded: Encoded, path: str, strict: bool) -> None:
        """Take in the next chunk. Raises DataError for a bad line under `strict`."""
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
        # A document may go over several chunks: its size is written when its end has come.
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
                f"{path}:{chunk.start.number}: a document of more than {_LONGEST_DOCUMENT} tokens"
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
        """Bring all to the disk and then say so in the journal."""
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
        """Write the index and the checksums. Raises DataError where there was no document."""
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
        """Move the files to their names, an index last and the tokens' the very last: a pair that has one is
        whole. Cut off in between, the same command does the rest."""
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
        """Remove what there is: with these inputs and options it cannot be resumed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not self.written and self.folder.exists():
            with contextlib.suppress(OSError):  # the disk may be what failed
                self.save()
        for file in (*self._files.values(), self._lock):
            file.close()
