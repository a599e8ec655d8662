"""Lower bounds of the bytes on a rank of a layout: states per element of its weights, and activations kept by forwards.

As in least_time.py the bounds are valid for every cut of the layers into chunks. Next: bounds.py, which combines both.
"""

from dataclasses import dataclass

from megalite.plan.activations import head_table, layer_table, logits_bytes, total
from megalite.plan.chunk_tables import ChunkPart, recomputed_bytes
from megalite.plan.sharing import Held
from megalite.plan.waiting_tables import waiting_table
from megalite.plan.work import Work


@dataclass(frozen=True)
class LeastKept:
    """Bytes for one micro-batch, the least of all layers. layer: kept by a layer for backward; waiting: kept by a layer
    between I and W; recomputed: before anything is freed; head: kept by the head; logits: a chunk of its logits;
    hidden: a message of the pipe axis."""

    layer: float
    waiting: float
    recomputed: float
    head: float
    logits: float
    hidden: float

    @classmethod
    def of(cls, work: Work, recompute: str) -> "LeastKept":
        """The bytes of a micro-batch. recompute: as in Candidate."""
        spec, at, layers = work.spec, work.at, range(work.spec.num_layers)
        examples = [*{spec.kind(layer): layer for layer in layers}.values()]
        parts = [ChunkPart(layers[i : i + 1], False, False) for i in examples]
        recomputed = 0
        if recompute in ("none", "selective"):
            selective = recompute == "selective"
            layer = min(total(layer_table(spec, i, at, selective)) for i in examples)
        else:
            every = 1 if recompute == "full" else int(recompute)
            layer = at.hidden(spec) / every
            recomputed = min(recomputed_bytes(spec, part.layers, every, at) for part in parts)
        waiting = min(total(waiting_table(spec, part, at)) for part in parts)
        head = total(head_table(spec, at))
        return cls(layer, waiting, recomputed, head, logits_bytes(spec, at), at.hidden(spec))

    @property
    def of_head(self) -> float:
        """Bytes on the rank with the head besides the layers': the logits are freed before the head's backward begins,
        and what the head keeps before the backward of the layers."""
        return max(self.head + self.logits, self.recomputed)


@dataclass(frozen=True)
class Rates:
    """Bytes per element of the weights; `routed`: of experts that an expert axis divides. permanent: weight, optimizer
    state, and the gradient if it always exists; gradient: added by the first backward otherwise."""

    permanent: float
    gradient: float
    permanent_routed: float
    gradient_routed: float

    def of(self, held: Held, gradients: bool) -> float:
        """Bytes for the weights `held`, with gradients or without."""
        shared, routed = self.permanent, self.permanent_routed
        if gradients:
            shared += self.gradient
            routed += self.gradient_routed
        return shared * held.shared + routed * held.routed
