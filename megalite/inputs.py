"""What a user gives, read so that all that can be wrong with it is a line: JSON, links, and what no rule foresaw.

A reader states rules for what users get wrong, and goes through `reading` for what nobody thought of: a library that
raises anything over a forged file. Next: config/reading.py, which reads the JSON of a run.
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
_SHOWN_CHARACTERS = 200  # of what a library says
_MOST_STREAMED = 1 << 28  # bytes of a text that comes from a pipe or a device
_CACHE = "snapshots"  # in Hugging Face's cache the files of models--NAME/snapshots/COMMIT are links to blobs/


@contextlib.contextmanager
def reading(what: str | Path, kind: type[UserError] = ConfigError) -> Iterator[None]:
    """Makes an error that no rule foresaw an error of `kind` that names `what` is read; ours pass unchanged.

    What it was raised from is shown with MEGALITE_TRACEBACK=1 (program.py), so that a bug of ours can be told from an
    odd file. A full disk is the machine's, and passes too.
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
        # A panic of Rust's libraries (tokenizers, safetensors) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
    return ": ".join(filter(None, [type(error).__name__, said])) + f" ({TRACEBACK}=1 shows where)"


def read_text(path: str | Path, kind: type[UserError] = ConfigError) -> str:
    """A file of UTF-8. An error of `kind` where it cannot be read or is none, or is a device without an end."""
    try:
        with open(path, "rb") as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            content = file.read() if is_file else file.read(_MOST_STREAMED + 1)
        if not is_file and len(content) > _MOST_STREAMED:
            rule = f"is no file: must end within {_MOST_STREAMED >> 20} MiB"
            raise kind(f"{path}: cannot be read: {rule}")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: cannot be read: it is not UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise kind(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def lines_of(path: str | Path, kind: type[UserError] = ConfigError) -> list[tuple[int, str]]:
    """(number from 1, line) of the lines of a UTF-8 file that are not blank. Only a newline ends a line, with or
    without a carriage return before it: JSON may hold the other characters at which `str.splitlines` splits."""
    lines = enumerate(read_text(path, kind).split("\n"), 1)
    return [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """Makes text that is not UTF-8 a ConfigError that names `what` is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: is not UTF-8 (byte {error.start})") from None


def read_standard_input(option: str) -> str:
    """All of standard input, which `option` asks for. ConfigError where it is not UTF-8."""
    with decoding(f"{option}: -"):
        return sys.stdin.read()


def parse_json(
    text: str,
    where: str | Path,
    kind: type[UserError] = ConfigError,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """`json.loads`, with everything that it can raise turned into one line after `where`. pairs, constant: its hooks;
    a ValueError from them is reported the same way."""
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        # JSON can write half of a character that needs two: nothing can write that out again.
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
    except (
        ValueError
    ) as error:  # of a hook, or Python's own of a number with more than 4,300 digits
        raise kind(f"{where}: {' '.join(str(error).split())[:_SHOWN_CHARACTERS]}") from None
    return value


def read_json_object(path: str | Path, kind: type[UserError] = ConfigError) -> dict[str, Any]:
    """A file that holds one JSON object. An error of `kind` where it does not."""
    value = parse_json(read_text(path, kind), path, kind)
    if not isinstance(value, dict):
        raise kind(f"{path}: must hold an object {{…}}")
    return value


def check_links(folder: str | Path, kind: type[UserError]) -> None:
    """An error of `kind` where a link in a folder leads out of it: who made the folder would choose which of the
    reader's files are read, and copied into what is made of it."""
    top = Path(os.path.realpath(folder))
    inside = top.parent.parent if top.parent.name == _CACHE else top
    for place, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                link = Path(folder) / path.relative_to(top)
                raise kind(
                    f"{link}: is a link to {os.readlink(path)}: must not lead out of the folder"
                )
