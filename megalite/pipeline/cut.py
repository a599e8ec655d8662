"""Assigns layers to chunks: the cut with the shortest simulated step.

The longest chunk alone does not decide. A head that costs as much as several layers is at the end of the pipeline,
where other work waits for it in one schedule and not in another, and interleaving with an even cut can be slower than
1F1B. So cuts are compared by simulating the schedule's own program with the costs of their chunks. Costs are
multiply-adds per token, the same on every machine, so all ranks find the same cut. Next: pipeline_plan.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megalite.model.chunks import Cut, layers_of
from megalite.model.spec import TransformerSpec
from megalite.pipeline.lengths import KINDS, Lengths
from megalite.programs.check import Cost
from megalite.programs.program import Kind, Program

MOST_TIMES = 20_000_000  # action times that a search may compute: a fifth of a second
TOGETHER = 1024  # cuts simulated at once: their times stay in the CPU's cache
PAIRED = 10  # first moves after which a second one is tried
CLIMBS = 2  # from one start, each with the program of the cut that the previous climb found
SAME = 1e-9  # relative differences of step lengths below this are rounding


@dataclass(frozen=True)
class LayerCosts:
    """Multiply-adds per token of one layer's forward. weights: products with weights, which backward repeats for the
    input and for the weight. core: attention's products, which backward repeats twice, both times for the inputs."""

    weights: float
    core: float


@dataclass(frozen=True)
class ModelCosts:
    """head: multiply-adds per token of the head's forward. recomputes: whether backward recomputes the forward."""

    layers: tuple[LayerCosts, ...]
    head: float
    recomputes: bool = False

    @classmethod
    def of(
        cls,
        spec: TransformerSpec,
        length: int,
        recomputes: bool,
        counted: float = 1.0,
        source: int = 0,
    ) -> "ModelCosts":
        """Costs of training on samples of `length` tokens, of which the share `counted` counts in the loss. The loss
        computes both gradients of the head in forward (parallel/loss.py), so the head's backward costs nothing; the
        embedding look-up costs nothing either. A dense layer before the head is counted with the head, as if it had
        no backward. source: source tokens of an encoder-decoder."""
        head = 3.0 * counted * spec.head_weights
        head += 3.0 * spec.hidden_size**2 if spec.head_transform else 0.0
        heads, layers = spec.num_heads * spec.head_size, range(spec.num_layers)
        if spec.stacks is not None:
            work = [spec.layer_work(layer, length, source) for layer in layers]
            found = tuple(LayerCosts(weights, 2 * heads * seen) for weights, seen in work)
            return cls(found, head, recomputes)
        spans = [_span(spec, layer, length) for layer in layers]
        return cls(
            tuple(
                LayerCosts(spec.layer_parameters(layer, used=True), heads * span)
                for layer, span in enumerate(spans)
            ),
            head,
            recomputes,
        )

    def of_chunks(self, counts: Sequence[int]) -> Cost:
        """The cost of each action. counts: layers of each chunk."""
        forwards, inputs, weights = [], [], []
        for layers in layers_of(counts):
            own = [self.layers[layer] for layer in layers]
            forward = sum(layer.weights + layer.core for layer in own)
            forwards.append(forward)
            inputs.append(
                sum(layer.weights + 2 * layer.core for layer in own)
                + (forward if self.recomputes else 0.0)
            )
            weights.append(sum(layer.weights for layer in own))
        forwards[-1] += self.head

        def cost(kind: Kind, chunk: int) -> float:
            match kind:
                case "F":
                    return forwards[chunk]
                case "I":
                    return inputs[chunk]
                case "W":
                    return weights[chunk]
            return inputs[chunk] + weights[chunk]

        return cost


def _span(spec: TransformerSpec, layer: int, length: int) -> int:
    """Positions that a token attends to, doubled for an encoder because a causal kernel skips half of them."""
    window = spec.window(layer)
    if spec.causal:
        return min(length, window or length)
    return 2 * min(length, 2 * window - 1 if window else length)


def even_counts(layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, which differ by at most one."""
    return [(chunk + 1) * layers // chunks - chunk * layers // chunks for chunk in range(chunks)]


def cut_by_cost(
    costs: ModelCosts, home: tuple[int, ...], program: Callable[[Cost], Program]
) -> Cut:
    """The cut with the shortest simulated step that the search finds. program: the schedule's, from the chunks' costs.

    Every chunk has a layer, except that the last may be the head alone. Hill climbing from two cuts, the even one and
    the one whose slowest rank has the least work: a layer moves to another chunk while that makes the step shorter.
    One climb simulates all its cuts with the program of its start; if the program depends on costs, the next climb
    uses that of the cut just found.
    """
    layers = len(costs.layers)
    if len(home) == 1:
        return Cut(home, (range(layers),))
    sums, budget = _Sums(costs), _Budget(MOST_TIMES)
    played = cache(Lengths)  # by program: most schedules have the same one for all costs
    even = even_counts(layers, len(home))
    starts = [even, _climb(even, lambda many: sums.longest_rank(home, many), budget)]
    found = [_climb_by_program(sums, start, program, played, budget) for start in starts]
    return Cut(home, layers_of(min(found)[1]))


def _climb_by_program(
    sums: "_Sums",
    start: list[int],
    program: Callable[[Cost], Program],
    played_by: Callable[[Program], Lengths],
    budget: "_Budget",
) -> tuple[float, list[int]]:
    """(length of the step, layers of each chunk) of the best cut found from `start`."""
    cost = sums.costs.of_chunks(start)
    played = played_by(program(cost))
    best = played.of(cost), start
    for _ in range(CLIMBS):
        spent = len(played)
        counts = _climb(
            best[1], lambda many, played=played: played.of_many(sums.tables(many)), budget, spent
        )
        if counts == best[1]:
            break
        cost = sums.costs.of_chunks(counts)
        played = played_by(program(cost))
        found = played.of(cost), counts
        if found[0] >= best[0]:
            break
        best = found
    return best


class _Sums:
    """Costs of the chunks of many cuts at once, from cumulative sums over the layers."""

    def __init__(self, costs: ModelCosts) -> None:
        self.costs = costs
        one = [costs.of_chunks([1] * len(costs.layers))] if costs.layers else []
        layers = range(len(costs.layers))
        kinds = [[cost(kind, layer) for layer in layers] for cost in one for kind in KINDS]  # type: ignore[arg-type]
        kinds[0][-1] -= costs.head
        self.upto = np.concatenate([np.zeros((len(KINDS), 1)), np.cumsum(kinds, axis=1)], axis=1)

    def tables(self, many: np.ndarray) -> np.ndarray:
        """[kind, chunk, K] for layers [K, chunk]."""
        stops = np.cumsum(many, axis=1).T  # [chunk, K]
        starts = stops - many.T
        tables = self.upto.take(stops, axis=1) - self.upto.take(starts, axis=1)
        tables[0, -1] += self.costs.head
        return tables

    def longest_rank(self, home: tuple[int, ...], many: np.ndarray) -> np.ndarray:
        """Cost [K] of a micro-batch on the slowest rank, plus a small term that prefers lighter chunks among equals."""
        tables = self.tables(many)
        chunks = tables[0] + tables[1]
        ranks = np.zeros((max(home) + 1, len(many)))
        for chunk, rank in enumerate(home):
            ranks[rank] += chunks[chunk]
        return np.max(ranks, axis=0) + 1e-6 * (chunks**2).sum(axis=0) / chunks.sum(axis=0)


class _Budget:
    """Action times that a search may still compute: a count, not a clock, so that all ranks find the same cut."""

    def __init__(self, left: int) -> None:
        self.left = left


def _climb(
    start: list[int],
    heights: Callable[[np.ndarray], np.ndarray],
    budget: _Budget,
    spent: int = 1,
) -> list[int]:
    """Moves one layer at a time while that lowers the height; if no move does, tries pairs of moves that start with one
    of the `PAIRED` best. heights: of cuts [K, chunk]. spent: what one height costs from the budget."""
    best, lowest = start, float(heights(np.array([start]))[0])

    def ranked(cuts: np.ndarray) -> list[tuple[float, list[int]]]:
        """The lowest `PAIRED` cuts with their heights, equal ones in lexical order."""
        cuts = cuts[: max(1, budget.left // spent)]
        budget.left -= spent * len(cuts)
        if not len(cuts):
            return []
        parts = range(0, len(cuts), TOGETHER)
        found = np.concatenate([heights(cuts[first : first + TOGETHER]) for first in parts])
        last = min(PAIRED, len(cuts)) - 1
        least = np.flatnonzero(found <= np.partition(found, last)[last])
        return sorted((float(found[i]), cuts[i].tolist()) for i in least)[:PAIRED]

    while budget.left > 0:
        moves = ranked(_moves(best))
        if moves and moves[0][0] >= lowest - SAME * lowest:
            moves = ranked(np.concatenate([_moves(first) for _, first in moves]))
        if not moves or moves[0][0] >= lowest - SAME * lowest:
            break
        lowest, best = moves[0]
    return best


def _moves(counts: Sequence[int]) -> np.ndarray:
    """Every cut [K, chunk] that results from moving one layer to another chunk."""
    chunks = range(len(counts))
    sources = [chunk for chunk in chunks if counts[chunk] > (0 if chunk == chunks[-1] else 1)]
    ways = [(source, target) for source in sources for target in chunks if target != source]
    moved = np.tile(np.array(counts), (len(ways), 1))
    if ways:
        taken, given = np.array(ways).T
        rows = np.arange(len(ways))
        moved[rows, taken] -= 1
        moved[rows, given] += 1
    return moved
