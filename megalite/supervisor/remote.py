"""Quoting for remote shells, so that words, variables and commands over ssh arrive unchanged.

DeepSpeed's pdsh launcher joins everything into one line for the shell of each host: variables in double quotes, where
`$()` and backticks run; arguments with a blank in double quotes, others bare; the folder and Python bare; and pdsh
substitutes %h, %n and %u. Here everything is quoted so that it survives DeepSpeed's own quoting. Every user of a host
can read that line, so anything that looks like a secret is omitted. Each host's shell is assumed to be POSIX.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megalite.errors import ConfigError
from megalite.inputs import read_text

ENV_FILE = "DS_ENV_FILE"  # DeepSpeed's: the file of variables that it exports on each host
# Read by DeepSpeed if ENV_FILE is not set.
USER_ENV_FILES = (Path("~/.deepspeed_env"), Path(".deepspeed_env"))
FORWARDED = (  # prefixes of names
    "CUDA_DEVICE", "CUDA_LAUNCH", "DEEPSPEED_", "DS_", "GLOO_", "HF_", "KMP_", "LD_LIBRARY", "MEGALITE_", "MKL_",
    "MLFLOW", "MV2", "NCCL_", "OMP_", "OPENBLAS_", "PATH", "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH_",
    "TRANSFORMERS_", "TRITON_", "UCX",
)  # fmt: skip
# Detects a host whose link is down within 20 s.
SSH_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
SSH_OPTIONS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *SSH_ALIVE.split()]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_ACTIVE = re.compile(r"[\"$`\\\n%]")
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|CREDENTIAL)S?[_0-9]*$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"://[^/\s@]*:[^/\s@]*@")  # an address with a password


def ssh(host: str, words: Sequence[str], port: int | None) -> list[str]:
    """A command line that runs a command on a host, in this folder. port: None for ssh's default."""
    at = [] if port is None else ["-p", str(port)]
    command = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
    return ["ssh", "-T", *SSH_OPTIONS, *at, "--", host, command]


def python_module(module: str, *arguments: str) -> list[str]:
    """A command line that runs one of our modules with this Python, on any host that shares the file system."""
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    return ["env", f"PYTHONPATH={path}", sys.executable, "-u", "-m", module, *arguments]


def word_for_deepspeed(word: str) -> str:
    """An argument in the form in which `deepspeed --launcher pdsh` passes it on unchanged."""
    word = word.replace("%", "%%")
    if " " in word:  # DeepSpeed puts it into double quotes and escapes those inside
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def bare_for_deepspeed(word: str) -> str:
    """The same for what DeepSpeed passes to the shell unquoted: its own options and the program's name."""
    return shlex.quote(word.replace("%", "%%"))


def variables(extra: dict[str, str]) -> dict[str, str]:
    """The variables for the ranks of every host: from this process's environment and .deepspeed_env, without secrets,
    plus `extra`."""
    found = {name: value for name, value in _asked_for().items() if not _is_secret(name, value)}
    for name, value in (found | extra).items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"environment: {name!r}: a name must consist of letters, digits and _"
            )
        if len(value.splitlines()) > 1:
            raise ConfigError(
                f"environment: {name}: {value!r}: must not contain a line break, to be sent to other hosts"
            )
    return found | extra


def secrets() -> list[str]:
    """Names of the variables that are not sent to other hosts, since a command line would show them."""
    return sorted(name for name, value in _asked_for().items() if _is_secret(name, value))


def _is_secret(name: str, value: str) -> bool:
    return bool(value) and bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def _asked_for() -> dict[str, str]:
    """Variables to be forwarded: by name, or from DeepSpeed's file."""
    found = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), found.get("PYTHONPATH", "")]))
    named = os.environ.get(ENV_FILE)
    for path in [Path(named)] if named else USER_ENV_FILES:
        # Not Path.expanduser, which raises if a container's user has no home.
        file = Path(os.path.expanduser(path))
        if file.is_file():
            for number, line in enumerate(read_text(file).splitlines(), 1):
                name, equals, value = line.partition("=")
                if equals:
                    found[name.strip()] = value.strip()
                elif line.strip():
                    raise ConfigError(f"{path}: line {number}: {line!r}: must be NAME=VALUE")
    found.pop(ENV_FILE, None)
    return found


def write_env_file(path: Path, values: dict[str, str]) -> None:
    """Writes a file for DeepSpeed, which wraps a value that is not plain in double quotes: our own pair closes them,
    and the value is in single quotes between."""
    lines = [
        f'{name}="{shlex.quote(value)}"\n'.replace("%", "%%") for name, value in values.items()
    ]
    path.touch(0o600)
    path.write_text("".join(lines))


def harmless_environment() -> dict[str, str]:
    """This process's environment for `deepspeed` itself, which forwards some of it unquoted: without secrets, and
    without values that a shell would interpret."""
    return {
        name: value
        for name, value in os.environ.items()
        if _NAME.fullmatch(name) and not _ACTIVE.search(value) and not _is_secret(name, value)
    }


def check_bare() -> None:
    """Raises ConfigError if this folder's or Python's path has characters that a shell would interpret, since DeepSpeed
    passes them unquoted."""
    for what, value in (("the folder", os.getcwd()), ("Python", sys.executable)):
        if not _BARE.fullmatch(value):
            rule = "must consist of letters, digits and @+=:,./_- to start on other hosts"
            raise ConfigError(f"{what} {value!r}: {rule}")
