"""The length of a program's step for many costs at once: for the search of a cut and for the planner's clock.

check.py simulates a program action by action and reports its faults. For the length alone, an order in which actions
become ready does not depend on their costs, so it is found once; then the times of an action under hundreds of costs
are one vector operation. Next: cut.py.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from megalite.programs.check import Cost, ProgramError
from megalite.programs.program import Program

KINDS = ("F", "B", "I", "W")


class _TimeRows(NamedTuple):
    """many: the number of rows. of_actions: for each action its kind, its chunk, the two rows that it waits for and its
    own row. last: the row of each rank's last action."""

    many: int
    of_actions: list[tuple[int, int, int, int, int]]
    last: list[int]


class Lengths:
    """Step lengths of one program. Raises ProgramError if it cannot run.

    The lists hold the actions of all ranks in an order in which each comes after those that it waits for: its kind,
    its chunk, and the positions of the rank's previous action and of the action that produces its input.
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
        """Moves each rank in turn as far as possible, until all are done."""
        last, passed = program.last_chunk, [0] * self.ranks
        # By chunk: the position of each micro-batch's forward, and of its backward to the input.
        forwards: list[dict[int, int]] = [{} for _ in program.home]
        backwards: list[dict[int, int]] = [{} for _ in program.home]
        newest, kinds = [-1] * self.ranks, {kind: number for number, kind in enumerate(KINDS)}
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(program.actions):
                while passed[rank] < len(actions):
                    kind, chunk, k = actions[passed[rank]]
                    given = forwards if kind == "F" else backwards
                    source, message = -1, False
                    if kind != "W":  # the chunk that produces the action's input, if any
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
                    passed[rank] += 1
                    moved = True
        if any(passed[rank] < len(actions) for rank, actions in enumerate(program.actions)):
            raise ProgramError("no rank can continue")
        self._last = newest

    def _counts(self) -> np.ndarray:
        """Number of actions [kind, chunk]."""
        counts = np.zeros((len(KINDS), self.chunks))
        np.add.at(counts, (self._kinds, self._chunks), 1)
        return counts

    def of(self, cost: Cost, hop: float = 0.0) -> float:
        """The length of a step. hop: time of a message between ranks."""
        table = [[cost(kind, chunk) for chunk in range(self.chunks)] for kind in KINDS]  # type: ignore[arg-type]
        ends = self._ends(table, hop)
        return max(ends[number] for number in self._last)

    def _ends(self, table: list[list[float]], hop: float) -> list[float]:
        """When each action ends, for costs [kind][chunk]; the extra 0 at the end, index -1, means "nothing before"."""
        ends = [0.0] * (len(self._kinds) + 1)
        rows = zip(
            self._kinds, self._chunks, self._before, self._source, self._message, strict=True
        )
        for number, (kind, chunk, before, source, message) in enumerate(rows):
            start, ready = ends[before], ends[source] + hop if message else ends[source]
            ends[number] = (start if start > ready else ready) + table[kind][chunk]
        return ends

    def path(self, table: np.ndarray, hop: float = 0.0) -> tuple[np.ndarray, int]:
        """The critical path for costs [kind, chunk]: its number of actions [kind, chunk] and of messages between ranks.
        Under any other costs a step takes at least as long as this chain of actions."""
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
        """Lengths [K] for costs [kind, chunk, K]; messages take no time."""
        times = [list(of_kind) for of_kind in np.ascontiguousarray(tables)]
        ends = list(np.zeros((self._rows.many, tables.shape[2])))
        maximum, add = np.maximum, np.add  # looked up once, not for each action
        for kind, chunk, before, source, own in self._rows.of_actions:
            end = ends[own]
            maximum(ends[before], ends[source], out=end)
            add(end, times[kind][chunk], out=end)
        return np.max([ends[row] for row in self._rows.last], axis=0)

    @cached_property
    def _rows(self) -> "_TimeRows":
        """The rows in which `of_many` keeps the end times of actions. A row is reused once no action waits for it any
        more, so that the rows fit the CPU's cache."""
        needed = {}  # by action: the last one that waits for it
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
            waits_and_own = rows[before], rows[source], rows[number]
            found.append((self._kinds[number], self._chunks[number], *waits_and_own))
        return _TimeRows(many, found, [rows[number] for number in self._last])
