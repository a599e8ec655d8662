"""Tighter bounds than those of bounds.py, from programs that were already simulated: their cut, their critical path,
and the moment at which each rank kept the most.

With other costs of the same actions a step takes at least as long as that chain of actions, and a rank keeps at least
as much as at that moment. So one simulation bounds hundreds of layouts with another micro-batch, tensor or context
axis or ZeRO stage by a few sums, and nearly as tightly as simulating them would. Next: search.py.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megalite.pipeline.cut import ModelCosts
from megalite.pipeline.lengths import KINDS, Lengths
from megalite.pipeline.pipeline_plan import PipelinePlan, make_plan
from megalite.pipeline.steps import AHEAD
from megalite.plan.bounds import LowerBounds
from megalite.plan.candidates import Candidate
from megalite.plan.sharing import Held, Sharing
from megalite.plan.step_time import PLAYED, hop_seconds, lengths_of, played_micro_batches
from megalite.plan.work import Work
from megalite.programs.check import most_bytes

NEAR = 0.99


class Moments(NamedTuple):
    """One moment of each rank. held, waits [rank, chunk]: micro-batches kept between F and its backward, and between I
    and W. begun [rank, chunk]: whether the chunk had a backward, so that it has gradients. with_head [rank]: whether
    the moment is in the head's forward."""

    held: np.ndarray
    waits: np.ndarray
    begun: np.ndarray
    with_head: np.ndarray


@dataclass(eq=False)
class Played:
    """What is known of a plan's program for `micro_batches`. counts [n, kind, chunk], hops [n]: actions and messages of
    the critical paths found. moments [n]: those at which ranks kept the most."""

    plan: PipelinePlan
    micro_batches: int
    counts: list[np.ndarray] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)

    @cached_property
    def lengths(self) -> Lengths:
        return lengths_of(self.plan, self.micro_batches)

    @cached_property
    def layers(self) -> np.ndarray:
        """Layers of each chunk."""
        return np.array([len(layers) for layers in self.plan.cut.layers])

    @cached_property
    def home(self) -> np.ndarray:
        """[rank, chunk]: whether the rank holds the chunk."""
        ranks = np.arange(self.plan.pipe)
        return np.array(self.plan.cut.home) == ranks[:, None]


class Programs:
    """The programs simulated so far in a search."""

    def __init__(self, bounds: LowerBounds) -> None:
        self.bounds = bounds
        self._played: dict[tuple[object, ...], Played] = {}
        self._costs: dict[bool, ModelCosts] = {}
        self._linear: dict[tuple[Work, Sharing, bool], tuple[np.ndarray, ...]] = {}

    def of(self, one: Candidate) -> Played:
        """The program of a layout, simulated at least once, for this layout or another with the same program."""
        recomputes = one.recompute not in ("none", "selective")
        if recomputes not in self._costs:
            search = self.bounds.search
            data = search.config.data
            self._costs[recomputes] = ModelCosts.of(
                search.spec, data.sequence_length, recomputes, data.counted_share
            )
        key, m = self._key(one), self.bounds.micro_batches(one)
        if key not in self._played:
            plan = make_plan(one.schedule, one.pipe, one.chunks, None, self._costs[recomputes])
            self._played[key] = Played(plan, played_micro_batches(plan, m))
            self.play(self._played[key], one)
        return self._played[key]

    def _key(self, one: Candidate) -> tuple[object, ...]:
        m = min(self.bounds.micro_batches(one), PLAYED * one.pipe)
        recomputes = one.recompute not in ("none", "selective")
        return one.schedule, one.pipe, one.chunks, recomputes, m

    def closest_seconds(self, one: Candidate) -> float:
        """The tightest bound that needs no further simulation."""
        least = self.bounds.least_seconds(one)
        return max(least, self.least_seconds(one)) if self._key(one) in self._played else least

    def learn(self, one: Candidate, seconds: float, size: float) -> None:
        """Simulates a layout's program if the bounds from others are far below `seconds` and `size`, its real
        values."""
        near = self.least_seconds(one) >= NEAR * seconds and self.least_bytes(one) >= NEAR * size
        if not near:
            self.play(self.of(one), one)

    def play(self, played: Played, one: Candidate) -> None:
        """Records the critical path and the moments of a layout."""
        counts, hops = played.lengths.path(self._times(played, one), self._hop(one))
        played.counts.append(counts)
        played.hops.append(hops)
        whole, between = self._kept(played, one)
        held, waits, begun = (np.zeros(played.home.shape) for _ in range(3))
        with_head = np.zeros(one.pipe)
        program = played.plan.program(played.micro_batches)
        for rank in range(one.pipe):
            most = most_bytes(
                program, rank, lambda chunk: int(whole[chunk]), lambda chunk: int(between[chunk])
            )
            for chunk, (count, waiting) in most.counts.items():
                held[rank, chunk], waits[rank, chunk] = count, waiting
                begun[rank, chunk] = chunk in most.through
            if most.action is not None:
                kind, chunk, _ = most.action
                with_head[rank] = kind == "F" and chunk == program.last_chunk
        played.moments.append(Moments(held, waits, begun, with_head))

    def least_seconds(self, one: Candidate) -> float:
        """A lower bound of the seconds of a layout's step."""
        bounds, played = self.bounds, self.of(one)
        times, hop = self._times(played, one), self._hop(one)
        chains = [
            float((counts * times).sum()) + hop * hops
            for counts, hops in zip(played.counts, played.hops, strict=True)
        ]
        m = bounds.micro_batches(one)
        kinds = [kind for kind in range(len(KINDS)) if played.lengths.counts[kind].any()]
        busy = (played.home * times[kinds].sum(axis=0)).sum(axis=1)
        length = max(chains) + (m - played.micro_batches) * float(busy.max())
        sharing, world = bounds.sharing(one), bounds.search.world_size
        shared_cores = bounds.device.ranks_a_core(world)
        length = max(length, shared_cores * m * float(busy.mean()))
        shared, routed = self._numbers(played, one)
        most = int((shared + routed).argmax())
        held = Held(float(shared[most]), float(routed[most]))
        end = sharing.end(bounds.work_of(one), held, world)
        return length + shared_cores * sum(end.values())

    def least_bytes(self, one: Candidate) -> float:
        """A lower bound of the bytes of the largest rank: at the known moments, and at the end of the last backward."""
        bounds, played = self.bounds, self.of(one)
        whole, between = self._kept(played, one)
        kept, bucket = bounds.kept_of(one), bounds.bucket_bytes(one)
        stands, gradients = self._state_bytes(played, one)
        pipe_ranks = np.arange(one.pipe)
        neighbours = (pipe_ranks > 0).astype(int) + (pipe_ranks < one.pipe - 1)
        messages = neighbours * (AHEAD + 1) * kept.hidden
        most = (stands + gradients).sum(axis=1) + bucket
        has_layers = played.home @ played.layers > 0
        for held, waits, begun, with_head in played.moments:
            # A backward recomputes its first layers before it frees what is held; but a W may come first.
            again = kept.recomputed * (has_layers & ~waits.any(axis=1))
            again = np.maximum(0.0, again - kept.head * played.home[:, -1])
            own = stands.sum(axis=1) + held @ whole + waits @ between
            own += np.maximum(again, kept.logits * with_head)
            if one.zero < 2:
                own += (begun * gradients).sum(axis=1)
                own += bucket * (one.zero == 1) * begun.any(axis=1)
            else:
                own += begun.any(axis=1) * gradients.sum(axis=1)
            most = np.maximum(most, own)
        return bounds.fixed_bytes(one) + float((most + messages).max())

    def _state_bytes(self, played: Played, one: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """[rank, chunk]: bytes that always exist, and gradients that exist from the first backward on."""
        result = []
        for gradients in (False, True):
            first, each, last = self.bounds.state_bytes(one, gradients)
            of_chunk = played.layers * each
            of_chunk[0] += first
            of_chunk[-1] += last
            result.append(played.home * of_chunk)
        stands, both = result
        return stands, both - stands

    def _hop(self, one: Candidate) -> float:
        bounds = self.bounds
        return hop_seconds(bounds.work_of(one), one.pipe, bounds.sharing(one).ranks)

    def _times(self, played: Played, one: Candidate) -> np.ndarray:
        """[kind, chunk]: lower bounds of the times; of the weights only those of layers, embedding and head count."""
        bounds, m = self.bounds, self.bounds.micro_batches(one)
        least, sharing = bounds.least_of(one), bounds.sharing(one)
        stops = np.cumsum(played.layers)
        upto = least.upto
        times = (upto[stops] - upto[stops - played.layers]).T
        times[:, 0] += least.embedding
        times[:, -1] += least.end
        fixed, shared, routed = self._rates(least.work, sharing, m > 1)
        # Chunks per rank: a rank's weights are spread evenly over them.
        each = played.home.sum(axis=1).max()
        own, own_routed = (numbers / each for numbers in self._numbers(played, one))
        times += fixed[:, None] + np.outer(shared - fixed, own @ played.home)
        times += np.outer(routed - fixed, own_routed @ played.home)
        return times / bounds.device.pipe_share

    def _rates(self, work: Work, sharing: Sharing, several: bool) -> tuple[np.ndarray, ...]:
        """[kind]: time of a micro-batch without weights, and with one weight of each sort: it is linear in them."""
        key = work, sharing, several
        if key not in self._linear:
            sorts = Held(0.0), Held(1.0), Held(0.0, 1.0)
            self._linear[key] = tuple(
                sharing.micro(work, held, several).sum(axis=1) for held in sorts
            )
        return self._linear[key]

    def _numbers(self, played: Played, one: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """[rank]: lower bounds of the number of weights, with those that an expert axis divides separate."""
        layer, (first, last) = self.bounds.layer_elements(one), self.bounds.table_elements(one)
        layers = played.home @ played.layers
        ends = played.home[:, 0] * first + played.home[:, -1] * last
        return layer.shared * layers + ends, layer.routed * layers

    def _kept(self, played: Played, one: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of a micro-batch in each chunk between F and its backward, and between I and W."""
        kept = self.bounds.kept_of(one)
        whole = kept.layer * played.layers
        whole[-1] += kept.head
        return whole, kept.waiting * played.layers
