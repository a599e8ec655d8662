"""How a mutant changes a session: it replaces an attribute or the stage's forward. Next: mutants.py."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite.prove.trace import Session


def put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute until the stack is closed."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


def change_forward(
    session: Session, change: Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]
) -> None:
    """Replaces the stage's forward by `change(forward, arguments)`, in training only.

    The arguments are those of Stage.forward: the input, labels, the Context, the chunk's number.
    """
    stage = session.engine.stage
    forward = stage.forward

    def changed(*arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            return change(forward, arguments)
        return forward(*arguments)

    stage.forward = changed
