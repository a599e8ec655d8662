"""Less than which no rank of a layout can hold, in bytes: what a number of weights takes, and what forwards keep.

As in least_time.py the bounds are of every cut of the layers into chunks. Next: bounds.py, which puts both together.
"""

from dataclasses import dataclass

from megalite.plan.activations import head_table, layer_table, logits_bytes, total
from megalite.plan.candidates import Candidate
from megalite.plan.chunk_tables import ChunkPart, made_again
from megalite.plan.sharing import Held
from megalite.plan.waiting_tables import waiting_table
from megalite.plan.work import Work


@dataclass(frozen=True)
class LeastKept:
    """Bytes that forwards keep for their backwards: of a layer and a micro-batch, and of that between I and W; what is
    made again before anything is freed; of the head; of a chunk of its logits; of a message of the pipe axis."""

    layer: float
    waiting: float
    again: float
    head: float
    logits: float
    hidden: float

    @classmethod
    def of(cls, work: Work, recompute: str) -> "LeastKept":
        """recompute: as of Candidate."""
        spec, at, layers = work.spec, work.at, range(work.spec.num_layers)
        examples = [*{spec.kind(layer): layer for layer in layers}.values()]
        parts = [ChunkPart(layers[i : i + 1], False, False) for i in examples]
        again = 0
        if recompute in ("none", "selective"):
            selective = recompute == "selective"
            layer = min(total(layer_table(spec, i, at, selective)) for i in examples)
        else:
            every = 1 if recompute == "full" else int(recompute)
            layer = at.hidden(spec) / every
            again = min(made_again(spec, part.layers, every, at) for part in parts)
        waiting = min(total(waiting_table(spec, part, at)) for part in parts)
        head = total(head_table(spec, at))
        return cls(layer, waiting, again, head, logits_bytes(spec, at), at.hidden(spec))

    @property
    def of_head(self) -> float:
        """Of the rank with the head: the logits are gone before its backward begins, and what it keeps itself before
        that of the layers."""
        return max(self.head + self.logits, self.again)


@dataclass(frozen=True)
class Rates:
    """Bytes of a number of weights, `routed` of one of experts that an expert axis divides. stands: of weights,
    optimizer, and gradients where they are there all the time; gradient: that comes with the first backward."""

    stands: float
    gradient: float
    stands_routed: float
    gradient_routed: float

    def of(self, held: Held, gradients: bool) -> float:
        """Of so many numbers, with gradients or without."""
        shared, routed = self.stands, self.stands_routed
        if gradients:
            shared += self.gradient
            routed += self.gradient_routed
        return shared * held.shared + routed * held.routed


def least_held(one: Candidate, micro_batches: int) -> list[int]:
    """The fewest micro-batches whose layers each rank of the pipe axis keeps at once."""
    p = one.pipe
    match one.schedule:
        case "interleaved":  # before its first backward, of the chunk of which it has fewest
            return [min(p, 2 * (p - 1 - rank) + 1) for rank in range(p)]
        case "zb-v":
            return [1] * p
    return [min(micro_batches, p - rank) for rank in range(p)]
