"""A pipeline schedule as data: a list of actions for each rank of the pipe axis.

The layers are cut into chunks, 0 … C-1 along the model; with one chunk per rank, a chunk is a stage. An action is work
on one chunk and one micro-batch:

    F   forward
    B   backward: gradients of the input and of the weights
    I   backward to the input only             } the two halves of B, for schedules that defer weight gradients
    W   gradients of the weights, after I      }   (zero bubble, arXiv 2401.10241)

A Value goes from one action to another: the activation that enters a chunk, or the gradient of a chunk's output. If
both chunks are on one rank it stays there, otherwise it is a message. Next: schedules.py, which makes programs.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """Work on one chunk and one micro-batch."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}.{self.micro_batch}"


class Value(NamedTuple):
    """What passes between neighbouring chunks: the `activation` that enters `chunk`, or the `gradient` of its
    output."""

    kind: Literal["activation", "gradient"]
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of chunk {self.chunk}, micro-batch {self.micro_batch}"


def needs(action: Action, last_chunk: int) -> Value | None:
    """The value that an action takes from another chunk, if any. last_chunk: the one with the head."""
    kind, chunk, k = action
    if kind == "F" and chunk > 0:
        return Value("activation", chunk, k)
    if kind in "BI" and chunk < last_chunk:
        return Value("gradient", chunk, k)
    return None


def gives(action: Action, last_chunk: int) -> Value | None:
    """The value that an action produces for another chunk, if any."""
    kind, chunk, k = action
    if kind == "F" and chunk < last_chunk:
        return Value("activation", chunk + 1, k)
    if kind in "BI" and chunk > 0:
        return Value("gradient", chunk - 1, k)
    return None


@dataclass(frozen=True)
class Program:
    """What each rank of a pipe axis does in one step.

    home[c]: the rank that holds chunk c. micro_batches: per step. actions[rank]: in order. A program without B and I
    is forward-only.
    """

    home: tuple[int, ...]
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Size of the pipe axis."""
        return len(self.actions)

    @property
    def last_chunk(self) -> int:
        """The chunk that has the head."""
        return len(self.home) - 1

    def chunks_of(self, rank: int) -> list[int]:
        """The chunks that a rank holds, in the order of the model."""
        return [chunk for chunk, home in enumerate(self.home) if home == rank]

    def needs(self, action: Action) -> Value | None:
        """The value that an action takes from another chunk, if any."""
        return needs(action, self.last_chunk)

    def gives(self, action: Action) -> Value | None:
        """The value that an action produces for another chunk, if any."""
        return gives(action, self.last_chunk)

    def way(self, value: Value) -> tuple[int, int]:
        """The ranks that a value goes from and to; they may be the same."""
        source = value.chunk - 1 if value.kind == "activation" else value.chunk + 1
        return self.home[source], self.home[value.chunk]

    def crosses(self, value: Value | None) -> bool:
        """Whether a value is a message between ranks."""
        return value is not None and len(set(self.way(value))) == 2

    def all_actions(self) -> Iterator[tuple[int, Action]]:
        """Every action with its rank."""
        for rank, actions in enumerate(self.actions):
            yield from ((rank, action) for action in actions)

    @cached_property
    def receipts(self) -> dict[Action, list[Value]]:
        """For each action that takes a message, the values that its rank has sent and that the message proves to have
        been received: its sender took them before it sent. Values without such a proof are left out."""
        makers, takers = dict[Value, tuple[int, int]](), dict[Value, tuple[int, int]]()
        for rank, actions in enumerate(self.actions):
            for number, action in enumerate(actions):
                if (given := self.gives(action)) is not None and self.crosses(given):
                    makers[given] = rank, number
                if (needed := self.needs(action)) is not None and self.crosses(needed):
                    takers[needed] = rank, number
        sent: dict[tuple[int, int], deque[tuple[int, Value]]] = {}
        # By the two ranks, in the order in which the receiver takes them.
        for value, (target, number) in sorted(takers.items(), key=lambda item: item[1]):
            sent.setdefault((makers[value][0], target), deque()).append((number, value))
        proven: dict[Action, list[Value]] = {}
        for rank, actions in enumerate(self.actions):
            for action in actions:
                needed = self.needs(action)
                if needed is None or needed not in makers:
                    continue
                source, made = makers[needed]
                waiting = sent.get((rank, source), deque())
                while waiting and waiting[0][0] <= made:
                    proven.setdefault(action, []).append(waiting.popleft()[1])
        return proven

    @cached_property
    def splits_backward(self) -> frozenset[tuple[int, int]]:
        """Chunk and micro-batch of each backward that is split into I and W."""
        return frozenset(
            (action.chunk, action.micro_batch)
            for _, action in self.all_actions()
            if action.kind == "I"
        )
