"""Forward passes through stages of one chunk a rank, for evaluation, likelihoods and generation without an engine."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megalite.parallel.grid import Axis
from megalite.pipeline.interpreter import Interpreter
from megalite.pipeline.mailbox import Mailbox
from megalite.pipeline.program import Action
from megalite.pipeline.steps import AHEAD, forward_stream


class Forwards:
    """Of one rank. mailbox: also for messages of the caller's own."""

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
        """Runs passes in the order of their numbers, which every rank must get alike; a number is taken `ahead` passes
        before its own. Returns when all that was sent is gone.

        forward(number, hidden): the pass on this rank's chunk; hidden: what came from the rank before, None on the
        first; the result goes to the next rank, and nowhere from the last. shape(number): of what is received.
        """

        def perform(action: Action, hidden: Tensor | None) -> Tensor:
            return forward(action.micro_batch, hidden)

        steps = forward_stream(self.axis.size, self.axis.rank, numbers, ahead)
        self._interpreter.run(steps, perform, lambda value: shape(value.micro_batch))
