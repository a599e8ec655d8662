"""Checks a program before a run and computes its cost on a simulated clock, which takes milliseconds.

`check` raises ProgramError, naming rank and action, for an action that is missing, duplicated, on the wrong rank or in
an order that cannot run, and for weight gradients that a chunk would not sum in the order of the micro-batches (the
rounding of a sum depends on its order; a schedule must not change it). Its Report has the step's length, the bubble
and what each rank holds. Messages: steps.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megalite.errors import MegaliteError
from megalite.programs.program import Action, Kind, Program, Value

Cost = Callable[[Kind, int], float]
"""Time of an action, by its kind and chunk, in any unit."""

_CHANGES = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1)}
"""By an action's kind: the change in the number of micro-batches held between F and B or I, and between I and W."""


class ProgramError(MegaliteError):
    """A program that must not run."""


def equal_costs(kind: Kind, chunk: int) -> float:
    """F, I and W take the same time; B takes twice that."""
    return 2.0 if kind == "B" else 1.0


@dataclass(frozen=True)
class Report:
    """A step on the simulated clock.

    length: of the step. busy[rank]: time spent in actions. ends[action]: when it ends. held[rank]: the most
    micro-batches held at once between F and B or I, summed over the rank's chunks. waiting[rank]: the most held
    between I and W.
    """

    length: float
    busy: tuple[float, ...]
    ends: dict[Action, float]
    held: tuple[int, ...]
    waiting: tuple[int, ...]

    @property
    def bubble(self) -> float:
        """The share of the step in which ranks are idle, averaged over the ranks."""
        return max(0.0, 1 - sum(self.busy) / (len(self.busy) * self.length))  # one rank: rounding


def check(program: Program, cost: Cost = equal_costs, hop: float = 0.0) -> Report:
    """Checks a program and simulates it. hop: time of a message. Raises ProgramError."""
    for rank in range(program.ranks):
        _check_complete(program, rank)
        _check_sums(program, rank)
    return _play(program, cost, hop)


def _check_complete(program: Program, rank: int) -> None:
    """Raises unless the rank has each action of its chunks exactly once, and no other."""
    actions, own = program.actions[rank], program.chunks_of(rank)
    doubled = [action for action, count in Counter(actions).items() if count > 1]
    if doubled:
        raise ProgramError(f"rank {rank}: {doubled[0]} occurs twice")
    kinds: dict[tuple[int, int], set[str]] = {}
    for action in actions:
        if action.chunk not in own:
            raise ProgramError(
                f"rank {rank}: {action}: chunk {action.chunk} is on rank {program.home[action.chunk]}"
            )
        kinds.setdefault((action.chunk, action.micro_batch), set()).add(action.kind)
    # Each chunk and micro-batch has a forward and, if there are backwards, either B or both of its halves.
    forward_only = not any(action.kind in "BI" for _, action in program.all_actions())
    allowed = [{"F"}] if forward_only else [{"F", "B"}, {"F", "I", "W"}]
    for chunk in own:
        for k in range(program.micro_batches):
            found = kinds.pop((chunk, k), set())
            if found not in allowed:
                there = ", ".join(sorted(found)) or "nothing"
                raise ProgramError(f"rank {rank}: chunk {chunk}, micro-batch {k}: has {there}")
    if kinds:
        chunk, k = next(iter(kinds))
        raise ProgramError(
            f"rank {rank}: chunk {chunk}: has no micro-batch {k}: a step has {program.micro_batches}"
        )


def _check_sums(program: Program, rank: int) -> None:
    """Raises unless each chunk sums its weight gradients in the order of the micro-batches."""
    for chunk in program.chunks_of(rank):
        order = [
            a.micro_batch for a in program.actions[rank] if a.chunk == chunk and a.kind in "BW"
        ]
        if order != sorted(order):
            raise ProgramError(
                f"rank {rank}: chunk {chunk}: sums weight gradients in the order {order}"
            )


def _play(program: Program, cost: Cost, hop: float) -> Report:
    """Every rank runs its actions in order, each as soon as its inputs are available."""
    player = _Player(program, cost, hop)
    while player.advance():
        pass
    stuck = [
        f"rank {rank} waits at {actions[player.done[rank]]}"
        for rank, actions in enumerate(program.actions)
        if player.done[rank] < len(actions)
    ]
    if stuck:
        raise ProgramError("; ".join(stuck))
    return Report(
        max(player.clock),
        tuple(player.busy),
        player.ends,
        tuple(player.most_held),
        tuple(player.most_waiting),
    )


class _Player:
    """The state of the simulated ranks."""

    def __init__(self, program: Program, cost: Cost, hop: float) -> None:
        ranks = program.ranks
        self.program, self.cost, self.hop = program, cost, hop
        self.done = [0] * ranks
        self.clock, self.busy = [0.0] * ranks, [0.0] * ranks
        self.held, self.most_held = [0] * ranks, [0] * ranks
        self.waiting, self.most_waiting = [0] * ranks, [0] * ranks
        self.ends: dict[Action, float] = {}
        self.arrives: dict[Value, float] = {}

    def advance(self) -> bool:
        """Moves each rank as far as possible. Returns whether any moved."""
        moved = False
        for rank, actions in enumerate(self.program.actions):
            while self.done[rank] < len(actions):
                ready = self._ready(actions[self.done[rank]])
                if ready is None:
                    break
                self._do(rank, actions[self.done[rank]], ready)
                moved = True
        return moved

    def _ready(self, action: Action) -> float | None:
        """When the inputs of an action are available; None if that is not known yet."""
        times: list[float | None] = [0.0]
        value = self.program.needs(action)
        if value is not None:
            times.append(self.arrives.get(value))
        if action.kind in "BI":
            times.append(self.ends.get(action._replace(kind="F")))
        elif action.kind == "W":
            times.append(self.ends.get(action._replace(kind="I")))
        known = [time for time in times if time is not None]
        return max(known) if len(known) == len(times) else None

    def _do(self, rank: int, action: Action, ready: float) -> None:
        length = self.cost(action.kind, action.chunk)
        self.clock[rank] = self.ends[action] = max(self.clock[rank], ready) + length
        self.busy[rank] += length
        value = self.program.gives(action)
        if value is not None:
            hop = self.hop if self.program.crosses(value) else 0.0
            self.arrives[value] = self.clock[rank] + hop
        held, waits = _CHANGES[action.kind]
        self.held[rank] += held
        self.waiting[rank] += waits
        self.most_held[rank] = max(self.most_held[rank], self.held[rank])
        self.most_waiting[rank] = max(self.most_waiting[rank], self.waiting[rank])
        self.done[rank] += 1


class MostKept(NamedTuple):
    """The moment at which a rank keeps the most bytes for its backwards. counts: by chunk, the micro-batches held
    between F and B or I, and between I and W. through: chunks that already had a backward. action: the one that
    causes it."""

    bytes: int
    counts: dict[int, tuple[int, int]]
    through: frozenset[int]
    action: Action | None


def most_bytes(
    program: Program, rank: int, whole: Callable[[int], int], between: Callable[[int], int]
) -> MostKept:
    """Finds the moment at which `rank` keeps the most bytes; of equal ones, the one after backwards of most chunks.

    whole(chunk): bytes of a micro-batch between F and B or I. between(chunk): between I and W."""
    now = {chunk: [0, 0] for chunk in program.chunks_of(rank)}
    wholes = {chunk: whole(chunk) for chunk in now}
    betweens = {chunk: between(chunk) for chunk in now}
    size, through = 0, set[int]()
    most = MostKept(0, {chunk: (0, 0) for chunk in now}, frozenset(), None)
    for action in program.actions[rank]:
        kind, chunk, _ = action
        held, waits = _CHANGES[kind]
        counts = now[chunk]
        counts[0] += held
        counts[1] += waits
        size += held * wholes[chunk] + waits * betweens[chunk]
        if (size, len(through)) > (most.bytes, len(most.through)):
            own = {c: (n, w) for c, (n, w) in now.items()}
            most = MostKept(size, own, frozenset(through), action)
        if kind in "BW":
            through.add(chunk)
    return most
