"""Runs the steps of a rank (steps.py): posts receives, runs actions, sends their results.

The caller defines the actions: a function from an action and its input value to its output value. Training,
evaluation, likelihoods and generation differ only in that function and in their steps. Next: actions.py.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megalite.parallel.clock import Clock
from megalite.parallel.timeline import RANK_TIMELINE
from megalite.pipeline.mailbox import Mailbox
from megalite.pipeline.steps import Act, Receive, Send, Step, Wait
from megalite.programs.program import Action, Value, gives, needs

Perform = Callable[[Action, Tensor | None], Tensor | None]
"""Runs an action: takes its input value and returns its output value, each None if there is none."""
Shape = Callable[[Value], tuple[int, ...]]
"""Shape of a received value."""

WORDS = {"F": "forward", "B": "backward", "I": "backward to the input", "W": "weight gradients"}


class Interpreter:
    """The interpreter of one rank.

    last_chunk: of the model. dtype: of values. tells_chunk: whether `instruction` names the chunk. action: the current
    one. whole, busy: clocks of a run and of the actions in it, off unless a measurement turns them on."""

    def __init__(
        self, mailbox: Mailbox, last_chunk: int, dtype: torch.dtype, tells_chunk: bool = False
    ) -> None:
        self.mailbox = mailbox
        self.last_chunk = last_chunk
        self.dtype = dtype
        self.tells_chunk = tells_chunk
        self.action: Action | None = None
        self.whole, self.busy = Clock(), Clock()

    def run(self, steps: Iterable[Step], perform: Perform, shape: Shape) -> None:
        """Runs all steps and waits until everything sent is complete."""
        with self.whole.computing():
            self._run(steps, perform, shape)
        self.action = None

    def _run(self, steps: Iterable[Step], perform: Perform, shape: Shape) -> None:
        made: dict[Value, Tensor] = {}
        received: set[Value] = set()
        for step in steps:
            match step:
                case Receive(key, source):
                    self.mailbox.post(key, source, shape(key), self.dtype)
                    received.add(key)
                case Act(action):
                    self.action = action
                    needed = needs(action, self.last_chunk)
                    value = self._take(needed, made, received)
                    with self.busy.computing(), RANK_TIMELINE.span("action", action):
                        given = perform(action, value)
                    del value
                    if (key := gives(action, self.last_chunk)) is not None:
                        assert given is not None, f"{action} gave nothing"
                        made[key] = given
                    del given
                case Send(key, target):
                    with RANK_TIMELINE.span("send", key):
                        self.mailbox.send(key, made.pop(key), target)
                case Wait(key):
                    with RANK_TIMELINE.span("sent", key):
                        self.mailbox.wait(key)
        with RANK_TIMELINE.span("sent", "all messages"):
            self.mailbox.finish()
        assert not made, f"made and never used: {list(made)}"

    def _take(
        self, value: Value | None, made: dict[Value, Tensor], received: set[Value]
    ) -> Tensor | None:
        if value is None:
            return None
        if value in received:
            received.remove(value)
            with RANK_TIMELINE.span("receive", value):
                return self.mailbox.take(value)
        return made.pop(value)

    @property
    def instruction(self) -> str:
        """What the rank is doing now, in words, for the report of a hang."""
        if self.action is None:
            return ""
        kind, chunk, k = self.action
        where = f" on chunk {chunk}" if self.tells_chunk else ""
        return f"{WORDS[kind]} of micro-batch {k}{where}"
