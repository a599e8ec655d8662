"""How long a step of one program is, for many costs at once: what cuts are searched by, and the planner's clock.

check.py plays a program action by action and says what is wrong with it. For the length alone, the order
in which actions become ready does not depend on their costs, so it is found once; then the times of an action under
hundreds of costs are one operation on a row of numbers. Next: cut.py.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from megalite.pipeline.check import Cost, ProgramError
from megalite.pipeline.program import Program

KINDS = ("F", "B", "I", "W")


class _Rows(NamedTuple):
    """many: how many there are; of_actions: kind and chunk of each action, the rows that it waits for and its own;
    last: of each rank's last action."""

    many: int
    of_actions: list[tuple[int, int, int, int, int]]
    last: list[int]


class Lengths:
    """Of one program. Raises ProgramError where it cannot run.

    order: the actions of all ranks so that each comes after what it waits for; of each its kind, its chunk, and the
    places in `order` of what it waits for: the rank's action before, and the one that gives its value.
    """

    def __init__(self, program: Program) -> None:
        self.ranks, self.chunks = program.ranks, len(program.home)
        self._kinds: list[int] = []
        self._chunks: list[int] = []
        self._before: list[int] = []
        self._source: list[int] = []
        self._message: list[bool] = []
        self._last: list[int] = []
        self._order(program)
        self.counts = self._counts()

    def __len__(self) -> int:
        return len(self._kinds)

    def _order(self, program: Program) -> None:
        """Moves each rank as far as it gets, in turn, until all are through."""
        last, place = program.last_chunk, [0] * self.ranks
        # By chunk, of each micro-batch the place in the order of its forward, and of its backward to the input.
        forwards: list[dict[int, int]] = [{} for _ in program.home]
        backwards: list[dict[int, int]] = [{} for _ in program.home]
        newest, kinds = [-1] * self.ranks, {kind: number for number, kind in enumerate(KINDS)}
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(program.actions):
                while place[rank] < len(actions):
                    kind, chunk, k = actions[place[rank]]
                    given = forwards if kind == "F" else backwards
                    source, message = -1, False
                    if kind != "W":  # the chunk that gives what the action needs; there may be none
                        neighbour = chunk - 1 if kind == "F" else chunk + 1
                        if 0 <= neighbour <= last:
                            source = given[neighbour].get(k, -1)
                            if source < 0:
                                break
                            message = program.home[neighbour] != rank
                        given[chunk][k] = len(self._kinds)
                    self._before.append(newest[rank])
                    self._source.append(source)
                    self._message.append(message)
                    newest[rank] = len(self._kinds)
                    self._kinds.append(kinds[kind])
                    self._chunks.append(chunk)
                    place[rank] += 1
                    moved = True
        if any(place[rank] < len(actions) for rank, actions in enumerate(program.actions)):
            raise ProgramError("no rank can continue")
        self._last = newest

    def _counts(self) -> np.ndarray:
        """[kind, chunk]: how many actions of each there are."""
        counts = np.zeros((len(KINDS), self.chunks))
        np.add.at(counts, (self._kinds, self._chunks), 1)
        return counts

    def of(self, cost: Cost, hop: float = 0.0) -> float:
        """Length of a step; hop: time of a message between ranks."""
        table = [[cost(kind, chunk) for chunk in range(self.chunks)] for kind in KINDS]  # type: ignore[arg-type]
        ends = self._ends(table, hop)
        return max(ends[number] for number in self._last)

    def _ends(self, table: list[list[float]], hop: float) -> list[float]:
        """When each action ends, for costs [kind][chunk]; one more 0 at the end, for "nothing before"."""
        ends = [0.0] * (len(self._kinds) + 1)
        rows = zip(
            self._kinds, self._chunks, self._before, self._source, self._message, strict=True
        )
        for number, (kind, chunk, before, source, message) in enumerate(rows):
            start, ready = ends[before], ends[source] + hop if message else ends[source]
            ends[number] = (start if start > ready else ready) + table[kind][chunk]
        return ends

    def path(self, table: np.ndarray, hop: float = 0.0) -> tuple[np.ndarray, int]:
        """The longest chain of actions that wait for each other, for costs [kind, chunk]: how many of each there are
        [kind, chunk], and how many messages between ranks. Whatever other costs are, a step takes no less than it."""
        ends = self._ends(table.tolist(), hop)
        counts, hops = np.zeros((len(KINDS), self.chunks)), 0
        number = max(self._last, key=lambda number: ends[number])
        while number >= 0:
            counts[self._kinds[number], self._chunks[number]] += 1
            source, message = self._source[number], self._message[number]
            waited = ends[source] + hop * message >= ends[self._before[number]]
            hops += waited and message
            number = source if waited and source >= 0 else self._before[number]
        return counts, hops

    def of_many(self, tables: np.ndarray) -> np.ndarray:
        """Lengths [K] for costs [kind, chunk, K], without time for messages."""
        times = [list(of_kind) for of_kind in np.ascontiguousarray(tables)]
        ends = list(np.zeros((self._rows.many, tables.shape[2])))
        maximum, add = np.maximum, np.add  # looked up once for a thousand actions
        for kind, chunk, before, source, own in self._rows.of_actions:
            end = ends[own]
            maximum(ends[before], ends[source], out=end)
            add(end, times[kind][chunk], out=end)
        return np.max([ends[row] for row in self._rows.last], axis=0)

    @cached_property
    def _rows(self) -> "_Rows":
        """Where `of_many` keeps the ends of actions. A row whose number nobody waits for any more is used again, so
        that the few that are left fit the processor's cache."""
        needed = {}  # by action, the last that waits for it
        for number, (before, source) in enumerate(zip(self._before, self._source, strict=True)):
            needed[before] = needed[source] = number
        needed |= dict.fromkeys(self._last, len(self))
        rows, spare, many = {-1: 0}, [], 1  # row 0: nothing before
        found = []
        for number, (before, source) in enumerate(zip(self._before, self._source, strict=True)):
            for past in {before, source} - {-1}:
                if needed[past] == number:
                    spare.append(rows[past])
            if not spare:
                spare.append(many)
                many += 1
            rows[number] = spare.pop()
            places = rows[before], rows[source], rows[number]
            found.append((self._kinds[number], self._chunks[number], *places))
        return _Rows(many, found, [rows[number] for number in self._last])
