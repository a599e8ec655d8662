"""Reads what users give, such as JSON files and folders, so that anything wrong with it becomes a one-line error.

A reader checks rules for the mistakes that users make. For the rest it runs inside `reading`, because a library may
raise any exception when it reads a malformed file. Next: config/reading.py, which reads the JSON of a run.
"""

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, MegaliteError, UserError

TRACEBACK = "MEGALITE_TRACEBACK"
FULL = (errno.ENOSPC, errno.EDQUOT)
_SHOWN_CHARACTERS = 200  # of a library's message
_MOST_STREAMED = 1 << 28  # bytes of a text that is read from a pipe or a device
_CACHE = "snapshots"  # in Hugging Face's cache, the files in models--NAME/snapshots/COMMIT are links to blobs/


@contextlib.contextmanager
def reading(what: str | Path, kind: type[UserError] = ConfigError) -> Iterator[None]:
    """Context manager that turns unexpected exceptions into an error of `kind` that names `what`, the thing being read.

    A MegaliteError passes through unchanged, and so does a full disk, which is a fault of the machine.
    MEGALITE_TRACEBACK=1 shows the original exception (ranks/run_program.py), to tell a bug of ours from a malformed
    file.
    """
    try:
        yield
    except MegaliteError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise
        raise kind(f"{what}: cannot be read: {error.strerror or error}") from error
    except BaseException as error:
        # A panic in a Rust library (tokenizers, safetensors) is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    message = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
    parts = filter(None, [type(error).__name__, message])
    return ": ".join(parts) + f" ({TRACEBACK}=1 shows the traceback)"


def read_text(path: str | Path, kind: type[UserError] = ConfigError) -> str:
    """The text of a UTF-8 file. Raises `kind` if the file cannot be read, is not UTF-8, or is an endless device."""
    try:
        with open(path, "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read() if is_file else file.read(_MOST_STREAMED + 1)
        if not is_file and len(content) > _MOST_STREAMED:
            rule = f"is not a file: must end within {_MOST_STREAMED >> 20} MiB"
            raise kind(f"{path}: cannot be read: {rule}")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: cannot be read: it is not UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise kind(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def lines_of(path: str | Path, kind: type[UserError] = ConfigError) -> list[tuple[int, str]]:
    """(line number from 1, line) of each line of a UTF-8 file that is not blank. Only LF or CR LF ends a line: JSON
    may contain the other characters at which `str.splitlines` splits."""
    lines = enumerate(read_text(path, kind).split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """Context manager that turns a UnicodeDecodeError into a ConfigError that names `what`, the thing being read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: is not UTF-8 (byte {error.start})") from None


def read_standard_input(option: str) -> str:
    """All of standard input, requested by `option`. Raises ConfigError if it is not UTF-8."""
    with decoding(f"{option}: -"):
        return sys.stdin.read()


def parse_json(
    text: str,
    where: str | Path,
    kind: type[UserError] = ConfigError,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """`json.loads` whose every exception becomes an error of `kind`, one line that begins with `where`.
    pairs, constant: hooks for `json.loads`; a ValueError that they raise is reported in the same way."""
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        # JSON can escape half of a surrogate pair, which cannot be encoded as UTF-8 again.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise kind(
            f"{where}: is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except UnicodeEncodeError:
        raise kind(f"{where}: holds half of a surrogate pair") from None
    except RecursionError:
        raise kind(f"{where}: cannot be read: it is nested too deeply") from None
    except ValueError as error:
        # Raised by a hook, or by Python for a number with more than 4,300 digits.
        raise kind(f"{where}: {' '.join(str(error).split())[:_SHOWN_CHARACTERS]}") from None
    return value


def read_json_object(path: str | Path, kind: type[UserError] = ConfigError) -> dict[str, Any]:
    """The JSON object in a file. Raises `kind` if the file contains anything else."""
    value = parse_json(read_text(path, kind), path, kind)
    if not isinstance(value, dict):
        raise kind(f"{path}: must be a JSON object {{…}}")
    return value


def check_links(folder: str | Path, kind: type[UserError]) -> None:
    """Raises `kind` if a symbolic link in a folder points outside it. Otherwise, whoever made the folder could choose
    which of the user's other files are read and copied into the output."""
    top = Path(os.path.realpath(folder))
    inside = top.parent.parent if top.parent.name == _CACHE else top
    for parent, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                link = Path(folder) / path.relative_to(top)
                raise kind(
                    f"{link}: is a symbolic link to {os.readlink(path)}: must not point outside the folder"
                )
