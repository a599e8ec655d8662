"""The search: every layout is estimated, and those that can be among the best are played and weighed exactly.

An estimate takes a cut into equal parts and the formula of the schedule's bubble; the real program with the real cut
is seldom faster. So layouts are tried in the order of their estimates until even SLACK of the next one's is slower than
the last of the best. Next: advice.py.
"""

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

from megalite.config import Config, check_model
from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS, moments_kept
from megalite.errors import ConfigError
from megalite.plan.activations import ChunkPart, layer_table, total, waiting_table
from megalite.plan.candidates import Candidate, Search, candidates, config_of
from megalite.plan.devices import FRAGMENTS, OVERHEAD_BYTES, Device
from megalite.plan.rank_memory import MemoryTable, RankMemory, SizesByPlace
from megalite.plan.states import DTYPES
from megalite.plan.step_time import Sharing, StepTime, Work, estimated_seconds, step_time

SLACK = 0.97
BEST = 10
FP32 = 4


@dataclass(frozen=True)
class Layout:
    """A candidate with what is predicted for it."""

    candidate: Candidate
    config: Config
    memory: RankMemory
    time: StepTime
    micro_batches: int
    sent: dict[str, float]
    """Bytes that a rank sends in a step, by axis."""

    def json(self) -> dict[str, Any]:
        """For programs. Bytes of the largest rank, seconds."""
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
    """layouts: the best that fit, fastest first; too_large: that were tried and do not fit, in the order of their
    estimates; accepted: layouts that the rules accept; fitting: of those, that fit by the estimate."""

    layouts: list[Layout]
    too_large: list[Layout]
    accepted: int
    fitting: int


@dataclass(eq=False)
class Planner:
    """memory_bytes: of a device, that a rank may use."""

    search: Search
    device: Device
    memory_bytes: float
    sizes: SizesByPlace = field(default_factory=SizesByPlace)

    @cached_property
    def dtype_bytes(self) -> int:
        """Of a number of weights and activations."""
        return DTYPES[self.search.config.precision].itemsize

    @cache  # noqa: B019  (a planner lives as long as its program)
    def work(self, tensor: int, micro: int, sequence: bool, recompute: str) -> Work:
        """What a micro-batch is."""
        config = self.search.config
        return Work(
            self.search.spec,
            self.device.among(self.search.world_size),
            tensor,
            micro,
            config.data.sequence_length,
            self.dtype_bytes,
            sequence,
            "full" if recompute.isdigit() else recompute,
            config.data.counted_share,
            config.parallel.expert,
        )

    def work_of(self, one: Candidate) -> Work:
        """Of a candidate."""
        return self.work(one.tensor, one.micro, one.sequence, one.recompute)

    def sharing(self, one: Candidate) -> Sharing:
        """Of a candidate's data axis."""
        optimizer = self.search.config.document.optimizer
        moments = 2 if optimizer is None else moments_kept(optimizer)
        offload = one.offload != "none"
        return Sharing(self.search.data(one), one.tensor, one.zero, offload, moments)

    def micro_batches(self, one: Candidate) -> int:
        """Of a step."""
        return self.search.batch // (self.search.data(one) * one.micro)

    def weights(self, one: Candidate) -> float:
        """Numbers of a rank, about: where all ranks of the pipe axis hold as much."""
        return (self.search.spec.num_parameters - self._elsewhere) / (one.pipe * one.tensor)

    @property
    def _elsewhere(self) -> float:
        """Numbers of experts that other ranks of the expert axis hold."""
        expert = self.search.config.parallel.expert
        return self.search.spec.expert_parameters * (1 - 1 / expert)

    def estimate(self, one: Candidate) -> float:
        """Seconds of a step."""
        return estimated_seconds(
            self.work_of(one),
            one.schedule,
            one.pipe,
            one.chunks,
            self.sharing(one),
            self.micro_batches(one),
            self.weights(one),
        )

    def estimated_bytes(self, one: Candidate) -> float:
        """What the first rank holds, about, with a cut into equal parts; the real cut gives a rank more or less."""
        spec, d, m = self.search.spec, self.search.data(one), self.micro_batches(one)
        layers = sum(map(spec.layer_parameters, range(spec.num_layers))) - self._elsewhere
        layers /= one.pipe
        weights = (layers + spec.vocabulary_size * spec.hidden_size) / one.tensor
        if one.pipe == 1:
            weights = self.weights(one)
        held = self._held_layers(one, m)
        e = self.dtype_bytes
        shared = FP32 * (0 if one.offload != "none" and not self.device.cores else 3)
        states = {
            0: (e + FP32 + FP32 * 2) * weights,
            1: (e + FP32 * (1 if m > 1 else 1 / d) + shared / d) * weights,
            2: (e + (FP32 + shared) / d) * weights,
            3: (e + FP32 + shared) / d * weights,
        }[one.zero]
        fixed = 0.0 if self.device.cores else OVERHEAD_BYTES + FRAGMENTS * self.device.memory_bytes
        if not self.device.cores and one.zero > 0:
            fixed += self._bucket_bytes(one.zero)
        halves = one.schedule.startswith("zb")
        return states + self._layer_bytes(self.work_of(one), one.recompute, halves) * held + fixed

    def _bucket_bytes(self, zero: int) -> float:
        given = self.search.config.document.zero_optimization
        size = (given and given.reduce_bucket_size) or REDUCE_BUCKET_ELEMENTS
        return (self.dtype_bytes if zero == 2 else FP32) * size

    def _held_layers(self, one: Candidate, m: int) -> float:
        """Layers times micro-batches that the first rank keeps."""
        layers = self.search.spec.num_layers / one.pipe
        if one.schedule == "interleaved":
            return layers * min(m, one.pipe * (1 + (one.pipe - 1) / (one.pipe * one.chunks)))
        return layers * min(m, one.pipe)

    @cache  # noqa: B019
    def _layer_bytes(self, work: Work, recompute: str, halves: bool) -> float:
        """What a layer keeps of a micro-batch; halves: most of them may be between I and W."""
        if halves:
            part = ChunkPart(range(1), False, False)
            between = total(waiting_table(work.spec, part, work.at))
            return max(self._layer_bytes(work, recompute, False), 0.75 * between)
        if recompute == "full" or recompute.isdigit():
            return work.hidden_bytes / (int(recompute) if recompute.isdigit() else 1)
        return total(layer_table(work.spec, 0, work.at, recompute == "selective"))

    def exact(self, one: Candidate) -> Layout:
        """Plays and weighs a candidate. Raises ConfigError where a rule refuses it after all."""
        config = config_of(self.search, one)
        check_model(config, self.search.spec)
        return self.layout(config, one)

    def layout(self, config: Config, one: Candidate) -> Layout:
        """Of a resolved config, whose candidate is `one`."""
        table = MemoryTable(config, self.search.spec, self.device, self.sizes)
        m, work, sharing = config.accumulation_steps, self.work_of(one), self.sharing(one)
        time = step_time(work, table.plan, sharing, m, table.weights)
        sent = sent_bytes(work, table, sharing)
        return Layout(one, config, table.largest, time, m, sent)

    def find(self, count: int = BEST) -> Found:
        """The best layouts that fit."""
        accepted, fitting, least = 0, [], []
        for one in candidates(self.search):
            accepted += 1
            needed = self.estimated_bytes(one)
            if SLACK * needed <= self.memory_bytes:
                fitting.append((self.estimate(one), accepted, one))
            else:
                least.append((needed, accepted, one))
        found = Found([], [], accepted, len(fitting))
        tried = _Tried(self)
        for estimate, _, one in sorted(fitting):
            best = found.layouts
            if len(best) >= count and SLACK * estimate > best[count - 1].time.seconds:
                break
            if not tried.is_worth(one):
                continue
            try:
                layout = self.exact(one)
            except ConfigError:
                continue  # a rule that the choices do not know
            tried.note(one, layout.memory.total)
            if layout.memory.total > self.memory_bytes:
                found.too_large.append(layout)
                continue
            best.append(layout)
            best.sort(key=lambda layout: layout.time.seconds)
        del found.layouts[count:]
        if not found.layouts and not found.too_large and least:
            found.too_large = [self.exact(one) for _, _, one in sorted(least)[:BEST]]
        return found


class _Tried:
    """Of layouts that were weighed, what that tells of others which differ in levers that only save memory and cost
    time: where one fits, no more of them are pulled; where one does not, the next must save enough."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.fits: set[Candidate] = set()
        self.beyond: dict[tuple[Candidate, bool], float] = {}

    def note(self, one: Candidate, weighed: float) -> None:
        """weighed: bytes of its largest rank."""
        if weighed <= self.planner.memory_bytes:
            self.fits.add(_plain(one))
        self.beyond[_plain(one), _keeps_inputs(one)] = weighed - self.planner.estimated_bytes(one)

    def is_worth(self, one: Candidate) -> bool:
        """Whether to weigh it."""
        if _plain(one) in self.fits:
            return False
        beyond = self.beyond.get((_plain(one), _keeps_inputs(one)), 0.0)
        return self.planner.estimated_bytes(one) + 0.9 * beyond <= self.planner.memory_bytes / SLACK


def _plain(one: Candidate) -> Candidate:
    """Without what only saves memory and costs time."""
    return replace(one, recompute="none", offload="none")


def _keeps_inputs(one: Candidate) -> bool:
    """Whether only inputs of layers are kept, which changes the cut."""
    return one.recompute not in ("none", "selective")


def sent_bytes(work: Work, table: MemoryTable, sharing: Sharing) -> dict[str, float]:
    """Bytes that the busiest rank of the pipe axis sends in a step, by axis (docs/layouts.md)."""
    config, plan, m = table.config, table.plan, table.config.accumulation_steps
    t, d, e, weights = work.tensor, sharing.ranks, work.dtype_bytes, max(table.weights)
    hidden = e * work.tokens * work.spec.hidden_size * (t - 1) / t
    passes = 8 + (4 if config.train.activation_checkpointing not in ("none", "selective") else 0)
    by_rank = []
    for rank in range(plan.pipe):
        own = plan.cut.chunks_of(rank)
        layers = sum(len(plan.cut.layers[chunk]) for chunk in own)
        ends = 2 * (0 in own) + 2 * (plan.cut.last_chunk in own)
        by_rank.append(m * hidden * (passes * layers + ends))
    crossing = [m * work.hidden_bytes * sum(_crossings(table, rank)) for rank in range(plan.pipe)]
    shared = (d - 1) / d * weights
    gradients = FP32 * {0: 2, 1: 1}.get(sharing.zero, m)
    whole = {0: 0.0, 3: e * (2 * m + 1.0)}.get(sharing.zero, float(e))
    return {
        "pipe": max(crossing),
        "data": (gradients + whole) * shared,
        "tensor": max(by_rank),
    }


def _crossings(table: MemoryTable, rank: int) -> list[int]:
    """Of each chunk of a rank how many neighbours are on other ranks: it sends each a message a micro-batch."""
    home = table.plan.cut.home
    neighbours = [
        [home[n] for n in (chunk - 1, chunk + 1) if 0 <= n < len(home)]
        for chunk, there in enumerate(home)
        if there == rank
    ]
    return [sum(there != rank for there in near) for near in neighbours]
