"""Pointwise work that torch.compile makes one kernel of, with `megalite.train.compile`: the gate of an MLP
(activation.py) and rotary positions (rotary.py), forward and backward; and the draws of dropout (dropout.py).

What is compiled are functions of tensors, called inside autograd functions of ours or without autograd. No parameter,
hook, message or generator with a state goes through the compiler, so ZeRO, the pipe axis, the tensor axis and
recomputation are not affected. A whole block is not compiled: there are collectives in it, DeepSpeed's hooks with
ZeRO-3, and weight gradients that wait with zero-bubble schedules (parallel/deferred.py).
"""

import os
import shutil
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from megalite.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
KEY = "megalite.train.compile"
RECOMPILE_LIMIT = 64
"""Forms of one function: training, evaluation, samples, and 0, 1 or more rows of an expert. torch's 8 are too few."""


class _Compiler:
    """Of this process: it is one rank, of one run."""

    wanted = False


def compile_pieces(wanted: bool) -> None:
    """Whether pieces are compiled in this process from now on; each is when it is first called."""
    _Compiler.wanted = wanted
    if wanted:  # a rank on a CPU starts with this (ranks/devices.py), which torch.compile heeds
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
        # A few small kernels: without it each rank starts a pool of processes for them.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def compiles() -> bool:
    """Whether pieces are compiled."""
    return _Compiler.wanted


@cache
def compiled(function: Function) -> Function:
    """What the compiler makes of a function of tensors. Sizes that change (tokens of an expert) are compiled for once
    more, and then for all. Inside a dispatch mode (parallel/traffic.py, prove/messages.py), where the compiler refuses
    to work, the function itself is called."""
    from torch._dynamo import config  # a second to import

    made = torch.compile(function, fullgraph=True)

    @wraps(function)
    def called(*values: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            return function(*values)
        # The compiler's settings are a thread's own, and backward on a GPU runs in one of autograd's.
        if config.recompile_limit != RECOMPILE_LIMIT:
            config.recompile_limit = RECOMPILE_LIMIT
        return made(*values)

    return called  # type: ignore[return-value]


def check_compiler() -> None:
    """ConfigError where there is no C++ compiler, which torch.compile calls: on a CPU for the kernels themselves, on
    GPUs for what starts Triton's."""
    program = os.environ.get("CXX") or "g++"
    if shutil.which(program) is None:
        raise ConfigError(f"{KEY}: true: needs the C++ compiler {program} on each node: not found")
