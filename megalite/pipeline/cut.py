"""Which layers are a chunk: the cut with the least simulated step.

The longest chunk alone does not decide: a head that costs as much as several layers is at the end of the pipeline,
where other work waits for it in one schedule and not in another, and interleaving with an even cut can be slower than
1F1B. So cuts are compared by playing the schedule's own program with the costs of their chunks. Costs are multiply-adds
a token, the same on every machine: all ranks find the same cut. Next: plan.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megalite.model.chunks import Cut, layers_of
from megalite.model.spec import TransformerSpec
from megalite.pipeline.check import Cost
from megalite.pipeline.lengths import KINDS, Lengths
from megalite.pipeline.program import Kind, Program

MOST_TIMES = 20_000_000  # of actions that a search computes: a fifth of a second
TOGETHER = 1024  # cuts that are played at once: their numbers stay in the processor's cache
PAIRED = 10  # first moves that a second one is tried on
CLIMBS = 2  # of one start, each with the program of the cut that the one before has found
SAME = 1e-9  # shares of a step that are rounding


@dataclass(frozen=True)
class LayerCosts:
    """Multiply-adds a token of one layer's forward. weights: products with weights, each of which backward does again
    for its input and for its weight; core: attention's products, which backward does twice, both for its inputs."""

    weights: float
    core: float


@dataclass(frozen=True)
class ModelCosts:
    """head: of the head's forward; recomputes: backward does a forward again."""

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
        """Of training on samples of `length` tokens, of which the share `counted` counts in the loss. The head's loss
        makes both gradients in forward (parallel/loss.py), so that its backward costs nothing; the embedding's look-up
        never does. A dense layer before the head is counted with it, as if it had no backward. source: tokens of an
        encoder-decoder's source."""
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
        """The cost of each action where the chunks have so many layers."""
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
    """Positions that attention works on for a token, taken twice in an encoder: a decoder's kernel leaves out half."""
    window = spec.window(layer)
    if spec.causal:
        return min(length, window or length)
    return 2 * min(length, 2 * window - 1 if window else length)


def even_counts(layers: int, chunks: int) -> list[int]:
    """Layers of each chunk where they all have as many, or one more."""
    return [(chunk + 1) * layers // chunks - chunk * layers // chunks for chunk in range(chunks)]


def cut_by_cost(
    costs: ModelCosts, home: tuple[int, ...], program: Callable[[Cost], Program]
) -> Cut:
    """The cut with the least simulated step that the search finds. program: the schedule's, for costs of chunks.

    Every chunk has a layer, but the last may be the head alone. Hill climbing from two cuts, the even one and the one
    with the shortest longest rank: a layer goes from a chunk to another while the step gets shorter. All cuts of a
    climb are played by the program of its start; where that depends on costs, the next climb has the one of its end.
    """
    layers = len(costs.layers)
    if len(home) == 1:
        return Cut(home, (range(layers),))
    sums, budget = _Sums(costs), _Budget(MOST_TIMES)
    played = cache(Lengths)  # of a program: most schedules have one for all costs
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
    """(length of the step, layers of each chunk) of the best cut that is found from a start."""
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
    """Costs of chunks for many cuts at once, from sums over the layers up to each."""

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
        """Cost of a micro-batch on the rank that has most; of equal ones that with the lighter chunks."""
        tables = self.tables(many)
        chunks = tables[0] + tables[1]
        ranks = np.zeros((max(home) + 1, len(many)))
        for chunk, rank in enumerate(home):
            ranks[rank] += chunks[chunk]
        return np.max(ranks, axis=0) + 1e-6 * (chunks**2).sum(axis=0) / chunks.sum(axis=0)


class _Budget:
    """Times of actions that a search may still compute: a count and no clock, so that all ranks find the same."""

    def __init__(self, left: int) -> None:
        self.left = left


def _climb(
    start: list[int],
    heights: Callable[[np.ndarray], np.ndarray],
    budget: _Budget,
    spent: int = 1,
) -> list[int]:
    """Takes the best move of one layer while there is one that makes it lower, else the best of two moves whose first
    is among the least bad. heights: of cuts [K, chunk]; spent: what the height of one takes of the budget."""
    best, lowest = start, float(heights(np.array([start]))[0])

    def ranked(cuts: np.ndarray) -> list[tuple[float, list[int]]]:
        """The least high, of equal ones the first in lexical order."""
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
    """Every way [K, chunk] in which one layer goes from a chunk to another."""
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
