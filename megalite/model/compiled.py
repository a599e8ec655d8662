"""Pointwise operations that torch.compile fuses into one kernel with `megalite.train.compile`: the gate of an MLP
(activation.py) and rotary embeddings (rotary.py), forward and backward, and dropout masks (dropout.py).

Only functions of tensors are compiled, which are called inside our autograd functions or without autograd. No
parameter, hook, message or stateful generator goes through the compiler, so ZeRO, the pipe axis, the tensor axis and
recomputation are not affected. A whole block is not compiled, because it contains collectives, DeepSpeed's hooks with
ZeRO-3, and deferred weight gradients with zero-bubble schedules (parallel/deferred.py).
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
KEY = "megalite.train.compile"
RECOMPILE_LIMIT = 64
"""Forms of one function: training, evaluation, samples, and 0, 1 or more rows of an expert. torch's 8 are too few."""


class _Compiler:
    """The setting of this process, which is one rank of one run."""

    wanted = False


def compile_pieces(wanted: bool) -> None:
    """Turns compilation on or off in this process. Each function is compiled when it is first called."""
    _Compiler.wanted = wanted
    if wanted:  # ranks/devices.py sets this variable on CPU ranks, which turns torch.compile off
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
        # Otherwise each rank starts a pool of processes, for a few small kernels.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def compiles() -> bool:
    """Whether compilation is on."""
    return _Compiler.wanted


@cache
def compiled(function: Function) -> Function:
    """The compiled form of a function of tensors. If a size changes (tokens of an expert), it is compiled once more for
    all sizes. Inside a dispatch mode (parallel/traffic.py, prove/messages.py), which the compiler does not support, the
    function itself is called."""
    from torch._dynamo import config  # takes a second to import

    made = torch.compile(function, fullgraph=True)

    @wraps(function)
    def called(*values: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            return function(*values)
        # The compiler's settings belong to a thread, and on a GPU backward runs in a thread of autograd.
        if config.recompile_limit != RECOMPILE_LIMIT:
            config.recompile_limit = RECOMPILE_LIMIT
        return made(*values)

    return called  # type: ignore[return-value]


def check_compiler() -> None:
    """Raises ConfigError if this node lacks what torch.compile needs: a C++ compiler; and on GPUs Triton, which builds
    its launcher with a C compiler and Python's headers (triton/runtime/build.py)."""
    program = os.environ.get("CXX") or "g++"
    if shutil.which(program) is None:
        raise _lacks(f"the C++ compiler {program}")
    if not machine_has_gpu():
        return
    if importlib.util.find_spec("triton") is None:
        raise _lacks("the package triton")
    programs = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, programs)):
        raise _lacks(f"the C compiler {' or '.join(programs)}")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise _lacks(f"Python's headers (Debian: python3-dev), {header}")


def _lacks(what: str) -> ConfigError:
    return ConfigError(f"{KEY}: true: needs {what} on each node: not found")
