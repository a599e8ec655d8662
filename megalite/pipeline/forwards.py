"""Forward passes through one chunk per rank, for evaluation, likelihoods and generation without an engine."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megalite.parallel.grid import Axis
from megalite.pipeline.interpreter import Interpreter
from megalite.pipeline.mailbox import Mailbox
from megalite.pipeline.steps import AHEAD, forward_stream
from megalite.programs.program import Action


class Forwards:
    """Forward passes of one rank. mailbox: may also be used for the caller's messages."""

    def __init__(self, axis: Axis, dtype: torch.dtype, device: torch.device) -> None:
        self.axis, self.mailbox = axis, Mailbox(axis, device)
        self._interpreter = Interpreter(self.mailbox, axis.size - 1, dtype)

    def run(
        self,
        numbers: Iterable[int],
        forward: Callable[[int, Tensor | None], Tensor],
        shape: Callable[[int], tuple[int, ...]],
        ahead: int = AHEAD,
    ) -> None:
        """Runs the passes in the order of `numbers`, which must be the same on every rank; a number is read `ahead`
        passes before it is run. Returns when everything sent is complete.

        forward(number, hidden): the pass on this rank's chunk. hidden: the previous rank's result, None on the first
        rank. The result is sent to the next rank, if there is one. shape(number): of what is received.
        """

        def perform(action: Action, hidden: Tensor | None) -> Tensor:
            return forward(action.micro_batch, hidden)

        steps = forward_stream(self.axis.size, self.axis.rank, numbers, ahead)
        self._interpreter.run(steps, perform, lambda value: shape(value.micro_batch))
