"""Which layers are a chunk: the cut with the least simulated step.

The longest chunk alone does not decide: a head that weighs as much as several layers stands at the end of the pipeline,
where other work waits for it in one schedule and not in another, and interleaving with an even cut can be slower than
1F1B. So cuts are compared by playing the schedule's own program with the costs of their chunks. Costs are multiply-adds
a token, the same on every machine: all ranks find the same cut. Next: plan.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megalite.model.chunks import Cut, layers_of
from megalite.model.spec import TransformerSpec
from megalite.pipeline.check import Cost, check
from megalite.pipeline.program import Kind, Program

MOST_ACTIONS = 400_000  # that a search plays: two seconds; a count and no clock, so that all ranks find the same
PAIRED = 10  # first moves that a second one is tried on


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
        cls, spec: TransformerSpec, length: int, recomputes: bool, counted: float = 1.0
    ) -> "ModelCosts":
        """Of training on samples of `length` tokens, of which the share `counted` counts in the loss. The head's loss
        makes both gradients in forward (parallel/loss.py), so that its backward costs nothing; the embedding's look-up
        never does. A dense layer before the head is counted with it, as if it had no backward."""
        head = 3.0 * counted * spec.head_weights
        head += 3.0 * spec.hidden_size**2 if spec.head_transform else 0.0
        spans = [_span(spec, layer, length) for layer in range(spec.num_layers)]
        heads = spec.num_heads * spec.head_size
        return cls(
            tuple(LayerCosts(spec.block_parameters, heads * span) for span in spans),
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
    costs: ModelCosts, home: tuple[int, ...], program: Callable[[Cost], Program], effort: int = 1
) -> Cut:
    """The cut with the least simulated step that the search finds. program: the schedule's, for costs of chunks;
    effort: what making a program takes beside playing it.

    Every chunk has a layer, but the last may be the head alone. Hill climbing from two cuts, the even one and the one
    with the shortest longest rank: a layer goes from a chunk to another while the step gets shorter.
    """
    layers = len(costs.layers)
    if len(home) == 1:
        return Cut(home, (range(layers),))
    played: dict[tuple[int, ...], float] = {}
    budget = MOST_ACTIONS

    def length(counts: list[int]) -> float:
        nonlocal budget
        key = tuple(counts)
        if key not in played:
            cost = costs.of_chunks(counts)
            made = program(cost)
            budget -= effort * sum(map(len, made.actions))
            played[key] = check(made, cost).length
        return played[key]

    starts = [even_counts(layers, len(home))]
    starts.append(
        _climb(starts[0], lambda counts: _longest_rank(costs, home, counts), lambda: True)
    )
    found = [_climb(start, length, lambda: budget > 0) for start in starts]
    return Cut(home, layers_of(min(found, key=length)))


def _climb(
    start: list[int], height: Callable[[list[int]], float], goes_on: Callable[[], bool]
) -> list[int]:
    """Takes the best move of one layer while there is one that makes it lower, else the best of two moves whose first
    is among the least bad."""
    best, lowest = start, height(start)
    while goes_on():
        moves = sorted((height(counts), counts) for counts in _moves(best) if goes_on())
        if moves and moves[0][0] >= lowest:
            pairs = (counts for _, first in moves[:PAIRED] for counts in _moves(first))
            moves = sorted((height(counts), counts) for counts in pairs if goes_on())
        if not moves or moves[0][0] >= lowest:
            break
        lowest, best = moves[0]
    return best


def _moves(counts: list[int]) -> Iterator[list[int]]:
    """Every way in which one layer goes from a chunk to another."""
    last = len(counts) - 1
    for source, count in enumerate(counts):
        if count > (0 if source == last else 1):
            for target in range(len(counts)):
                if target != source:
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    yield moved


def _longest_rank(costs: ModelCosts, home: tuple[int, ...], counts: list[int]) -> float:
    """Cost of a micro-batch on the rank that has most; of equal ones that with the lighter chunks."""
    cost = costs.of_chunks(counts)
    chunks = [cost("F", chunk) + cost("B", chunk) for chunk in range(len(home))]
    ranks = [
        sum(c for c, there in zip(chunks, home, strict=True) if there == rank) for rank in set(home)
    ]
    return max(ranks) + 1e-6 * sum(chunk**2 for chunk in chunks) / sum(chunks)
