"""Hostfiles, parsed so strictly that no line has a special meaning for ssh, pdsh or a shell.

DeepSpeed passes a line that begins with `-o` to ssh as an option (launcher/runner.py:486), and runs only on this
machine if the file does not exist or names one host.
"""

import re
from pathlib import Path

from megalite.errors import ConfigError
from megalite.inputs import read_text

_LINE = re.compile(
    r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)[ \t]+slots=([1-9][0-9]{0,3})[ \t]*(?:#.*)?"
)
RULE = "must be NAME slots=N, with a name of letters, digits, dots and dashes, or a comment after #"


def read_hostfile(path: str) -> dict[str, int]:
    """Ranks by host, in the file's order. Raises ConfigError, which names the line."""
    try:
        text = read_text(path)
    except ConfigError as error:
        raise ConfigError(f"--hostfile: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t") or line.lstrip(" \t").startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip(" \t"))
        if found is None:
            raise ConfigError(f"{path}: line {number}: {line!r}: {RULE}")
        name, slots = found[1], int(found[2])
        if name in hosts:
            raise ConfigError(f"{path}: line {number}: {line!r}: {name} must be listed only once")
        hosts[name] = slots
    if not hosts:
        raise ConfigError(f"--hostfile: {path}: has no hosts: a line {RULE}")
    return hosts


def write_hostfile(path: Path, hosts: dict[str, int]) -> None:
    """Writes a hostfile for DeepSpeed."""
    path.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
