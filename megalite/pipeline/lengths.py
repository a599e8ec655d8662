"""How long a step of one program is, for many costs at once: what cuts are searched by, and the planner's clock.

check.py plays a program action by action and says what is wrong with it. For the length alone, the order
in which actions become ready does not depend on their costs, so it is found once; then the times of an action under
hundreds of costs are one operation on a row of numbers. Next: cut.py.
"""

import numpy as np

from megalite.pipeline.check import Cost, ProgramError
from megalite.pipeline.program import Program

KINDS = ("F", "B", "I", "W")
COLUMNS = 512, 2048  # costs that are played together, at least and at most
TIMES = 4_000_000  # of actions that are held at once: 32 MB


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
        last, place, given = program.last_chunk, [0] * self.ranks, {}
        newest, kinds = [-1] * self.ranks, {kind: number for number, kind in enumerate(KINDS)}
        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(program.actions):
                while place[rank] < len(actions):
                    kind, chunk, k = actions[place[rank]]
                    source, message = -1, False
                    # The chunk that gives what the action needs; -1: none does.
                    neighbour = {"F": chunk - 1, "W": -1}.get(kind, chunk + 1)
                    if 0 <= neighbour <= last:
                        source = given.get((kind == "F", neighbour, k), -1)
                        if source < 0:
                            break
                        message = program.home[neighbour] != rank
                    self._before.append(newest[rank])
                    self._source.append(source)
                    self._message.append(message)
                    newest[rank] = len(self._kinds)
                    if kind != "W":
                        given[kind == "F", chunk, k] = newest[rank]
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
        least, most = COLUMNS
        columns = min(most, max(least, TIMES // len(self)))
        parts = range(0, tables.shape[2], columns)
        return np.concatenate(
            [self._of_some(tables[:, :, first : first + columns]) for first in parts]
        )

    def _of_some(self, tables: np.ndarray) -> np.ndarray:
        tables = np.ascontiguousarray(tables)
        ends = np.zeros((len(self._kinds) + 1, tables.shape[2]))
        rows = zip(self._kinds, self._chunks, self._before, self._source, strict=True)
        for number, (kind, chunk, before, source) in enumerate(rows):
            np.maximum(ends[before], ends[source], out=ends[number])
            ends[number] += tables[kind, chunk]
        return ends[self._last].max(axis=0)
