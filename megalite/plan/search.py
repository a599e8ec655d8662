"""The search: branch and bound. Layouts are tried in the order of their lower bounds (bounds.py), whole families first;
the search ends when the next one cannot be faster than the last of the best.

    grid        axes and sequence parallelism, bounded by their layers with the largest micro-batch
    size        a micro-batch; then the same with recomputation, which only costs time
    states      ZeRO's stage and offload
    order       schedule and chunks: one layout, bounded by what was simulated for others (played.py)
    layout      its program is simulated with its real cut, and its memory computed

Recomputation and offload only save memory: of layouts that differ only in them, the fastest that fits is reported. A
layout that cannot fit is dropped as soon as that is known. tests/unit/plan/test_plan.py compares this with an
exhaustive search.

Next: advice.py.
"""

import heapq
import math
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from megalite.config import Config, check_model
from megalite.errors import ConfigError
from megalite.plan.bounds import LowerBounds
from megalite.plan.candidates import GRID, STATES, Candidate, Choices, config_of, how_many
from megalite.plan.played import Programs
from megalite.plan.rank_memory import MemoryTable, RankMemory, SizesByStage
from megalite.plan.sent import sent_bytes
from megalite.plan.step_time import StepTime, step_time

BEST = 10
SMALLEST = 40  # most layouts of which the one with the least memory is taken
NEAR = 200  # layouts that nearly fit, among which faster ones are looked for


@dataclass(frozen=True)
class PlannedLayout:
    """A candidate with its predictions."""

    candidate: Candidate
    config: Config
    memory: RankMemory
    time: StepTime
    micro_batches: int
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by axis."""

    def json(self) -> dict[str, Any]:
        """The layout as `--json` prints it: bytes of the largest rank, and seconds."""
        return {
            "keys": self.candidate.keys,
            "data": self.config.data_size,
            "micro_batches": self.micro_batches,
            "bytes_by_rank": self.memory.total,
            "bytes": self.memory.parts,
            "sent_bytes": self.sent,
            "bubble": self.time.bubble,
            "step_seconds": self.time.seconds,
            "seconds": self.time.parts,
        }


@dataclass
class Found:
    """layouts: the best that fit, fastest first. too_large: some that are faster and do not fit, smallest first.
    accepted: number of layouts that the rules accept. weighed: how many of those were simulated in full."""

    layouts: list[PlannedLayout]
    too_large: list[PlannedLayout]
    accepted: int
    weighed: int


@dataclass(eq=False)
class Planner(LowerBounds):
    """Predicts and searches layouts. memory_bytes: of a device, that a rank may use."""

    memory_bytes: float
    sizes: SizesByStage = field(default_factory=SizesByStage)

    def exact(self, one: Candidate) -> PlannedLayout:
        """Simulates a candidate in full. Raises ConfigError if a rule refuses it after all."""
        config = config_of(self.search, one)
        check_model(config, self.search.spec)
        return self.layout(config, one)

    def accepted(self, one: Candidate) -> PlannedLayout | None:
        """The same; None if a rule refuses it that `Choices` does not apply."""
        try:
            return self.exact(one)
        except ConfigError:
            return None

    def layout(self, config: Config, one: Candidate) -> PlannedLayout:
        """The layout of a resolved config, whose candidate is `one`."""
        table = MemoryTable(config, self.search.spec, self.device, self.sizes)
        sent = sent_bytes(self.work_of(one), table, self.sharing(one))
        m = config.accumulation_steps
        return PlannedLayout(one, config, table.largest, self._time(table, one), m, sent)

    def again(self, layout: PlannedLayout) -> PlannedLayout:
        """Another planner's layout on this planner's device: its time is predicted again, its memory is the same."""
        table = MemoryTable(layout.config, self.search.spec, self.device, self.sizes)
        return replace(layout, time=self._time(table, layout.candidate))

    def _time(self, table: MemoryTable, one: Candidate) -> StepTime:
        m = table.config.accumulation_steps
        return step_time(self.work_of(one), table.plan, self.sharing(one), m, table.weights)

    def find(self, count: int = BEST) -> Found:
        """The best layouts that fit."""
        search = _BestFirst(self, count)
        search.run()
        best = sorted(search.best.values(), key=_seconds)[:count]
        return Found(best, search.faster(best), how_many(self.search), search.weighed)

    def by_size(self) -> list[Candidate]:
        """Layouts that take little memory: the smallest micro-batch and 1F1B, in the order of their lower bounds."""
        choices, found = Choices(self.search), []
        for grid in choices.of(GRID):
            for sized in islice(choices.of(("micro",), grid), 1):
                found += choices.of(("recompute", *STATES), sized)
        return sorted(found, key=self.least_bytes)

    def smallest(self) -> PlannedLayout:
        """The layout that takes the least memory. Raises ConfigError if the rules accept none."""
        layouts: list[PlannedLayout] = []
        for one in self.by_size():
            least = min((layout.memory.total for layout in layouts), default=math.inf)
            if len(layouts) == SMALLEST or self.least_bytes(one) >= least:
                break
            if (layout := self.accepted(one)) is not None:
                layouts.append(layout)
        if not layouts:
            raise ConfigError(
                f"--world-size: {self.search.world_size}: the config's rules accept no layout for this many ranks "
                f"with a global batch of {self.search.batch}"
            )
        return min(layouts, key=lambda layout: layout.memory.total)


def _seconds(layout: PlannedLayout) -> float:
    return layout.time.seconds


class _BestFirst:
    """One search. waiting: a heap of (lower bound of seconds, number, level, choices so far)."""

    def __init__(self, planner: Planner, count: int) -> None:
        self.planner, self.count, self.choices = planner, count, Choices(planner.search)
        self.programs = Programs(planner)
        self.waiting: list[tuple[float, int, str, Candidate]] = []
        self.number = 0
        self.best: dict[Candidate, PlannedLayout] = {}
        """The fastest that fits, by the choices other than recompute and offload."""
        self.too_large: list[tuple[float, float, Candidate]] = []
        """(least bytes, least seconds, layout)"""
        self.weighed = 0

    def run(self) -> None:
        """Searches until no remaining layout can be among the best."""
        for grid in self.choices.of(GRID):
            sizes = list(self.choices.of(("micro",), grid))
            if sizes:
                self._wait(self._of_layers(sizes[-1]), "grid", grid)
        levels = {
            "grid": self._sizes,
            "size": self._states,
            "states": self._orders,
            "order": self._look,
            "layout": self._weigh,
        }
        while self.waiting:
            least, _, level, one = heapq.heappop(self.waiting)
            if least >= self._limit():
                break
            levels[level](one, least)

    def _wait(self, least: float, level: str, one: Candidate) -> None:
        self.number += 1
        heapq.heappush(self.waiting, (least, self.number, level, one))

    def _limit(self) -> float:
        """Seconds of the last of the best layouts."""
        if len(self.best) < self.count:
            return float("inf")
        return sorted(map(_seconds, self.best.values()))[self.count - 1]

    def _of_layers(self, one: Candidate) -> float:
        """A lower bound from the layers alone, without a bubble: a sample is fastest in the largest micro-batch."""
        least, spec = self.planner.least_of(one), self.planner.search.spec
        whole = -(-spec.num_layers // one.pipe) * (least.forward + least.backward)
        return self.planner.micro_batches(one) * max(whole, least.layers / one.pipe)

    def _of_model(self, one: Candidate) -> float:
        """A lower bound from the whole model, without a bubble."""
        least = self.planner.least_of(one)
        longest = least.longest(one.pipe) if one.pipe > 1 else least.whole
        return self.planner.micro_batches(one) * longest

    def _sizes(self, grid: Candidate, least: float) -> None:
        for one in self.choices.of(("micro",), grid):
            self._wait(max(least, self._of_model(one)), "size", one)

    def _states(self, sized: Candidate, least: float) -> None:
        for one in self.choices.of(STATES, sized):
            self._wait(max(least, self.planner.least_seconds(one, evenly=True)), "states", one)
        ways = [one.recompute for one in self.choices.of(("recompute",), sized)]
        for way in ways[ways.index(sized.recompute) + 1 :][:1]:
            more = sized._replace(recompute=way)
            self._wait(max(least, self._of_model(more)), "size", more)

    def _orders(self, chosen: Candidate, least: float) -> None:
        room = self.planner.memory_bytes
        sizes: dict[str, float] = {}  # by schedule: the bound does not depend on chunks
        for schedule, chunks in self.choices.orders(chosen):
            one = chosen._replace(schedule=schedule, chunks=chunks)
            if one.schedule not in sizes:
                sizes[one.schedule] = self.planner.least_bytes(one)
            if sizes[one.schedule] <= room:
                self._wait(max(least, self.planner.least_seconds(one)), "order", one)
            else:
                self.too_large.append((sizes[one.schedule], least, one))

    def _look(self, one: Candidate, least: float) -> None:
        """Tightens the bound with what was simulated for others."""
        if self._is_beaten(one, least):
            return
        if one.pipe > 1:
            size = self.programs.least_bytes(one)
            if size > self.planner.memory_bytes:
                self.too_large.append((size, least, one))
                return
            least = max(least, self.programs.least_seconds(one))
        self._wait(least, "layout", one)

    def _is_beaten(self, one: Candidate, least: float) -> bool:
        """Whether a layout that differs only in recompute and offload fits and is as fast."""
        known = self.best.get(_plain(one))
        return known is not None and known.time.seconds <= least

    def _weigh(self, one: Candidate, least: float) -> None:
        if self._is_beaten(one, least):
            return
        known, layout = self.best.get(_plain(one)), self.planner.accepted(one)
        if layout is None:
            return
        self.weighed += 1
        if one.pipe > 1:
            self.programs.learn(one, layout.time.seconds, layout.memory.total)
        if layout.memory.total > self.planner.memory_bytes:
            self.too_large.append((layout.memory.total, layout.time.seconds, one))
        elif known is None or layout.time.seconds < known.time.seconds:
            self.best[_plain(one)] = layout

    def faster(self, best: list[PlannedLayout], tried: int = 3) -> list[PlannedLayout]:
        """Layouts that need a little more memory and are faster than the best that fit, the smallest first."""
        if not best:
            return []
        limit = best[0].time.seconds
        found = [
            (size, n, one) for n, (size, least, one) in enumerate(self.too_large) if least < limit
        ]
        near = [one for _, _, one in heapq.nsmallest(NEAR, found)]
        likely = (one for one in near if self.programs.closest_seconds(one) < limit)
        layouts = [self.planner.accepted(one) for one in islice(likely, tried)]
        faster = [one for one in layouts if one is not None and one.time.seconds < limit]
        return sorted(faster, key=lambda layout: layout.memory.total)


def _plain(one: Candidate) -> Candidate:
    """A candidate without recompute and offload."""
    return one._replace(recompute="none", offload="none")
