"""Pipeline schedules: pure functions from the pipe axis and the number of micro-batches to a Program.

| name        | chunks a rank | source                                                                        |
|-------------|---------------|-------------------------------------------------------------------------------|
| 1f1b        | 1             | arXiv 2104.04473, section 2.2                                                 |
| interleaved | v             | arXiv 2104.04473, section 2.3                                                 |
| zb-h1       | 1             | zero bubble with 1F1B's memory, arXiv 2401.10241, section 4                   |
| zb-v        | 2, in a V     | zero bubble, two chunks per rank, arXiv 2401.10241, section 6; 2405.15362   |

p ranks, m micro-batches, v chunks per rank. A new schedule is one function and one entry of SCHEDULES: config, planner,
report, proofs and tests read it there. Next: check.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush

from megalite.programs.check import Cost, ProgramError, equal_costs
from megalite.programs.program import Action, Kind, Program


def straight(p: int) -> tuple[int, ...]:
    """The rank of each chunk, with one chunk per rank."""
    return tuple(range(p))


def round_robin(p: int, v: int) -> tuple[int, ...]:
    """v chunks per rank, p apart."""
    return tuple(chunk % p for chunk in range(p * v))


def v_shaped(p: int) -> tuple[int, ...]:
    """Two chunks per rank: down the ranks and up again, so that rank 0 has both ends of the model."""
    return (*range(p), *reversed(range(p)))


def one_f_one_b(p: int, m: int) -> Program:
    """Rank i runs p - i - 1 warm-up forwards, then alternates forwards and backwards, then runs the remaining
    backwards."""
    actions = []
    for rank in range(p):
        ahead, own = min(p - rank - 1, m), []
        for k in range(m + ahead):
            if k < m:
                own.append(Action("F", rank, k))
            if k >= ahead:
                own.append(Action("B", rank, k - ahead))
        actions.append(tuple(own))
    return Program(straight(p), m, tuple(actions))


def interleaved(p: int, m: int, v: int) -> Program:
    """1F1B over p · v chunks: a rank runs p micro-batches on one chunk, then the same on its next chunk. p must divide
    m."""
    if m % p:
        raise ProgramError(
            f"interleaved: {m} micro-batches: must be a multiple of the pipe axis, {p}"
        )
    total, actions = m * v, []
    for rank in range(p):
        ahead, own = min(total, 2 * (p - rank - 1) + (v - 1) * p), []
        for n in range(total + ahead):
            if n < total:
                own.append(_nth(p, v, rank, n, "F"))
            if n >= ahead:
                own.append(_nth(p, v, rank, n - ahead, "B"))
        actions.append(tuple(own))
    return Program(round_robin(p, v), m, tuple(actions))


def _nth(p: int, v: int, rank: int, n: int, kind: Kind) -> Action:
    """The n-th forward or backward of a rank: in groups of p micro-batches, chunk by chunk; backwards from the last
    chunk."""
    group, within = divmod(n, p * v)
    turn = within // p
    local = turn if kind == "F" else v - 1 - turn
    return Action(kind, local * p + rank, group * p + within % p)


def zb_h1(p: int, m: int) -> Program:
    """1F1B with split backwards: rank i defers the weight gradients of i micro-batches, which fill the bubble at its
    end. Each rank then keeps as many activations as the first rank under 1F1B."""
    actions = []
    for rank in range(p):
        forward = min(p - rank - 1, m)
        own = [Action("F", rank, k) for k in range(forward)]
        for k in range(m):
            if forward < m:
                own.append(Action("F", rank, forward))
                forward += 1
            own.append(Action("I", rank, k))
            if k >= rank:
                own.append(Action("W", rank, k - rank))
        own += [Action("W", rank, k) for k in range(max(0, m - rank), m)]
        actions.append(tuple(own))
    return Program(straight(p), m, tuple(actions))


def zb_v(p: int, m: int, cost: Cost = equal_costs) -> Program:
    """Two chunks per rank in a V, by list scheduling. A rank keeps at most 2p micro-batches of its half-size chunks, as
    much as the first rank under 1F1B.

    An idle rank takes the first of these that is ready: a backward to the input, a forward of its second chunk, a
    weight gradient, a forward of its first chunk. With weight gradients before new forwards and equal times of F, I
    and W, the step takes 6m + p - 1 such times, the minimum: the last rank gets its first input after p - 1 and has
    6m actions. With uneven times the other order may be shorter, so both are tried.
    """
    home = v_shaped(p)

    def made(*ranking: str) -> tuple[Program, float]:
        def ranked(kind: str, chunk: int) -> tuple[int, int]:
            name = kind if kind != "F" else "F2" if chunk >= p else "F1"
            return ranking.index(name), -chunk  # ties: the later chunk first

        return _Lister(home, m, cost, "FIW", room=2 * p).program(ranked)

    programs = [made("I", "F2", "W", "F1"), made("I", "F2", "F1", "W")]
    return min(programs, key=lambda found: found[1])[0]


def forward_only(home: tuple[int, ...], m: int) -> Program:
    """Forwards only, for evaluation: a rank takes the latest of its chunks that are ready."""
    lister = _Lister(home, m, equal_costs, "F", room=len(home) * m)
    return lister.program(lambda kind, chunk: (0, -chunk))[0]


class _Lister:
    """List scheduling on a simulated clock. room: the most micro-batches that a rank may keep between F and W."""

    def __init__(self, home: tuple[int, ...], m: int, cost: Cost, kinds: str, room: int) -> None:
        self.home, self.m, self.kinds, self.room = home, m, kinds, room
        self.ranks, self.last = max(home) + 1, len(home) - 1
        self.own = [
            [chunk for chunk, rank in enumerate(home) if rank == r] for r in range(self.ranks)
        ]
        # Room that a forward of a chunk needs: its own, and one for each later chunk of its rank. Otherwise forwards of
        # the first chunk would fill the room and nothing could continue.
        self.taken = {
            chunk: len(own) - number for own in self.own for number, chunk in enumerate(own)
        }
        self.costs = {kind: [cost(kind, chunk) for chunk in range(len(home))] for kind in kinds}  # type: ignore[arg-type]
        # By kind and chunk: the end times of the actions placed so far, in the order of the micro-batches.
        self.ends: dict[str, list[list[float]]] = {kind: [[] for _ in home] for kind in kinds}
        self.free, self.held = [0.0] * self.ranks, [0] * self.ranks
        self.lists: list[list[Action]] = [[] for _ in range(self.ranks)]
        self.moments: list[tuple[float, int]] = []

    def program(self, ranked: Callable[[str, int], tuple[int, int]]) -> tuple[Program, float]:
        """The program and its length. ranked(kind, chunk): sort key; of the ready actions the smallest runs first."""
        choices = [
            sorted(
                ((kind, chunk) for kind in self.kinds for chunk in own), key=lambda c: ranked(*c)
            )
            for own in self.own
        ]
        # A rank looks for work when it becomes idle, and when an action ends that it may have been waiting for.
        self.moments = [(0.0, rank) for rank in range(self.ranks)]
        while self.moments:
            now, rank = heappop(self.moments)
            if self.free[rank] > now:
                continue
            for kind, chunk in choices[rank]:
                if self._ready(rank, kind, chunk) <= now:
                    self._append(rank, kind, chunk, now)
                    break
        if sum(map(len, self.lists)) < len(self.kinds) * len(self.home) * self.m:
            raise ProgramError("no rank can continue: too little room")
        program = Program(self.home, self.m, tuple(tuple(actions) for actions in self.lists))
        return program, max(self.free)

    def _ready(self, rank: int, kind: str, chunk: int) -> float:
        """When the next action of a kind and chunk can start: infinite if its input is not placed yet or there is no
        room."""
        k = len(self.ends[kind][chunk])
        if kind == "W":
            needed = self.ends["I"][chunk]
        elif kind == "F":
            if k == self.m or self.held[rank] + self.taken[chunk] > self.room:
                return math.inf
            if chunk == 0:
                return 0.0
            needed = self.ends["F"][chunk - 1]
        elif chunk < self.last:
            needed = self.ends["I"][chunk + 1]
        else:
            needed = self.ends["F"][chunk]
        return needed[k] if len(needed) > k else math.inf

    def _append(self, rank: int, kind: str, chunk: int, start: float) -> None:
        times = self.ends[kind][chunk]
        self.lists[rank].append(Action(kind, chunk, len(times)))  # type: ignore[arg-type]
        end = self.free[rank] = start + self.costs[kind][chunk]
        times.append(end)
        self.held[rank] += {"F": 1, "I": 0, "W": -1}[kind]
        heappush(self.moments, (end, rank))
        neighbour = chunk + {"F": 1, "I": -1, "W": 0}[kind]
        if 0 <= neighbour <= self.last and self.home[neighbour] != rank:
            heappush(self.moments, (end, self.home[neighbour]))


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """What the rest of megalite needs to know of a schedule.

    about: for its users. home(p, v): the rank of each chunk. program(p, m, v, cost): the program. bubble(p, m, v): of
    equal stages, with I and W each as long as F, as a share of the step: a formula and its value. chunks: per rank;
    None if the user chooses. whole_groups: p must divide m. least_held(p, m): by rank, a lower bound of the
    micro-batches whose layers it keeps at the same time, on any cut into chunks.
    """

    about: str
    home: Callable[[int, int], tuple[int, ...]]
    program: Callable[[int, int, int, Cost], Program]
    bubble: Callable[[int, int, int], tuple[str, float]]
    chunks: int | None = 1
    whole_groups: bool = False
    least_held: Callable[[int, int], list[int]] = lambda p, m: [1] * p


def _waits(work: str, units: Callable[[int], int]) -> Callable[[int, int, int], tuple[str, float]]:
    """The bubble of a schedule in which a rank waits for p − 1 units of time, besides its work on m micro-batches
    (arXiv 2104.04473, section 2.2, and 2401.10241, section 3). units(v): of a micro-batch on a rank; three for each
    chunk with split backwards (F, I and W). work: units(v) · m as text."""

    def bubble(p: int, m: int, v: int) -> tuple[str, float]:
        return f"(p − 1) / ({work} + p − 1)", (p - 1) / (units(v) * m + p - 1)

    return bubble


def _warmed_up(p: int, m: int) -> list[int]:
    """The micro-batches that each rank holds after 1F1B's warm-up, with one chunk per rank."""
    return [min(m, p - rank) for rank in range(p)]


SCHEDULES = {
    "1f1b": PipelineSchedule(
        about="one chunk of layers per rank",
        home=lambda p, v: straight(p),
        program=lambda p, m, v, cost: one_f_one_b(p, m),
        bubble=_waits("m", lambda v: 1),
        least_held=_warmed_up,
    ),
    "interleaved": PipelineSchedule(
        about="several chunks per rank, for a smaller bubble and more messages",
        home=round_robin,
        program=lambda p, m, v, cost: interleaved(p, m, v),
        bubble=_waits("v·m", lambda v: v),
        chunks=None,
        whole_groups=True,
        # Before a rank's first backward, of the chunk with the fewest.
        least_held=lambda p, m: [min(p, 2 * (p - 1 - rank) + 1) for rank in range(p)],
    ),
    "zb-h1": PipelineSchedule(
        about="weight gradients fill the bubble",
        home=lambda p, v: straight(p),
        program=lambda p, m, v, cost: zb_h1(p, m),
        bubble=_waits("3·m", lambda v: 3),
        least_held=_warmed_up,
    ),
    "zb-v": PipelineSchedule(
        about="weight gradients fill the bubble, with two chunks per rank in a V shape: the smallest bubble",
        home=lambda p, v: v_shaped(p),
        program=lambda p, m, v, cost: zb_v(p, m, cost),
        bubble=_waits("6·m", lambda v: 6),
        chunks=2,
    ),
}


def home_of(schedule: str, p: int, v: int) -> tuple[int, ...]:
    """The rank that holds each chunk. v: chunks per rank; ignored by schedules with a fixed number."""
    return SCHEDULES[schedule].home(p, v)


@cache
def ends_together(schedule: str, p: int, v: int) -> bool:
    """Whether one rank holds the first and the last chunk, and so both uses of a tied embedding."""
    home = home_of(schedule, p, v)
    return home[0] == home[-1]


def make_program(schedule: str, p: int, m: int, v: int, cost: Cost = equal_costs) -> Program:
    """The program of a schedule, by name."""
    return SCHEDULES[schedule].program(p, m, v, cost)
