"""A lower bound of the seconds of a layout's step.

It is valid for every cut of the layers into chunks, so that no cut has to be searched and no program played. p: ranks
of the pipe axis; m: micro-batches; f, b: seconds of a rank's forward and backward; T = f + b (I and W together if
backwards are split), so that ΣT does not depend on the cut. Every path through a program is a lower bound of its
length, whatever the costs:

    any rank r        it starts after the forwards before it and has m T_r of work: Σ_{s<r} f_s + m T_r; if its last
                      action is a B, those of the ranks before it follow: Σ_{s<r} T_s + m T_r
    1F1B, any rank r  the first micro-batch to the last rank and back; all of the rank's work except what it did
                      meanwhile; the last micro-batch to the last rank and back: ΣT + (m - 1 - w) T_r + Σ_{s>r} T_s,
                      where w = p - 1 - r micro-batches are ahead of their backwards
    1F1B, any rank r  with only one of these two trips: ΣT + (m - 1) T_r - w f_r

For 1F1B with m > p, the longest second path of all ranks is shortest if all T_r are equal: (m + p - 1) ΣT / p, the
formula of an even cut. In the other cases the first path, over all ranks, gives the bound. Layers are not divided, and
the head is on one rank. tests/unit/plan/test_plan.py compares the bound with every layout of small worlds.
Next: least_memory.py, the same for bytes.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megalite.plan.step_time import PLAYED
from megalite.plan.work import BACKWARD, FORWARD, Work


@dataclass(frozen=True, eq=False)
class LeastWork:
    """Seconds of a Work that the bounds are computed from. model: [kind] of the whole model; forward, backward: the
    least of a layer; layers: forward and backward of all layers; head: its forward and its backward."""

    work: Work

    @cached_property
    def model(self) -> np.ndarray:
        return self.work.model.sum(axis=1)

    @cached_property
    def whole(self) -> float:
        """Seconds of forward and backward of the whole model."""
        return float(self.model[[FORWARD, BACKWARD]].sum())

    @cached_property
    def upto(self) -> np.ndarray:
        """[layer + 1, kind]: seconds of all layers before each."""
        return self.work.layers.sum(axis=2)

    @cached_property
    def embedding(self) -> np.ndarray:
        """[kind]: seconds of the embedding."""
        return self.work.embedding.sum(axis=1)

    @cached_property
    def end(self) -> np.ndarray:
        """[kind]: seconds of the head."""
        return self.work.head.sum(axis=1)

    @cached_property
    def _by_layer(self) -> np.ndarray:
        """[layer, kind]: seconds of each layer."""
        return np.diff(self.upto, axis=0)

    @cached_property
    def forward(self) -> float:
        return float(self._by_layer[:, FORWARD].min())

    @cached_property
    def backward(self) -> float:
        return float(self._by_layer[:, BACKWARD].min())

    @cached_property
    def layers(self) -> float:
        return float(self.upto[-1][[FORWARD, BACKWARD]].sum())

    @cached_property
    def head(self) -> tuple[float, float]:
        """Seconds of the head: (forward, backward)."""
        return float(self.end[FORWARD]), float(self.end[BACKWARD])

    @cache  # noqa: B019  (a LeastWork lives as long as the search)
    def longest(self, p: int) -> float:
        """Least seconds of a micro-batch on the slowest of p ranks; layers are not divided, and the head is on one."""
        own, rest = _whole_layers(self.work.spec.num_layers, p)
        layer = self.forward + self.backward
        uneven = float(np.maximum(rest * layer, own * layer + sum(self.head)).min())
        return max(uneven, self.whole / p)

    @cached_property
    def ratio(self) -> float:
        """The least share of a layer's time that is forward."""
        times = self._by_layer
        return float((times[:, FORWARD] / (times[:, FORWARD] + times[:, BACKWARD])).min())


def least_length(least: LeastWork, schedule: str, p: int, m: int, whole: float) -> float:
    """Least seconds of a program of m micro-batches. whole: ΣT. Micro-batches beyond those that step_time.py plays take
    the time of the slowest rank."""
    played = min(m, PLAYED * p)
    layers, layer = least.work.spec.num_layers, least.forward + least.backward
    # Three bounds: for a rank without the head, for the rank with it, both by the number of layers that the latter may
    # have, and for all ranks together.
    own, rest = _whole_layers(layers, p)
    of_rest = m * rest * layer
    of_last = m * (own * layer + sum(least.head))
    if schedule == "1f1b":
        less = layer + min(p - 1, played - 1) * least.forward
        of_rest = np.maximum(of_rest, whole + m * rest * layer - rest * less)
        of_last = of_last + whole - own * layer - sum(least.head)
        together = (m + p - 1) * whole / p
        if played <= p:
            together = _few(whole, p, played) + (m - played) * whole / p
    elif schedule == "zb-h1":
        of_last = of_last + least.model[FORWARD] - own * least.forward - least.head[0]
        together = _waiting(least, p, played, whole) + (m - played) * whole / p
    else:
        # The chunks that a rank starts with have at least one layer each.
        first = least.forward
        if schedule == "interleaved":
            first = layer
            of_last = of_last + (p - 1) * layer
        together = m * whole / p + first * (p - 1) / 2
        # At least `many` ranks have `rest` layers if none has more; the last of these waits for the ones before it.
        many = np.maximum(1, layers - own - (p - 1) * (rest - 1))
        of_rest = of_rest + np.minimum(m * layer, (many - 1) * first)
    return max(together, float(np.maximum(of_rest, of_last).min()))


def _whole_layers(layers: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of layers that the last rank (zb-v: the rank with both ends) may have, and for each of them the least
    that the fullest of the other ranks has."""
    own = np.arange(layers // p + 2)
    return own, np.ceil((layers - own) / (p - 1))


def _few(whole: float, p: int, m: int) -> float:
    """Least length L of 1F1B with m <= p. The second path bounds the last m - 1 ranks: ΣT over them <= L - ΣT. The
    first path bounds the others one by one, T_r <= (L - Σ_{s<r} T_s) / m: ΣT over them <=
    L (1 - (1 - 1/m)^(p + 1 - m))."""
    return 2 * whole / (2 - (1 - 1 / m) ** (p + 1 - m))


def _waiting(least: LeastWork, p: int, m: int, whole: float) -> float:
    """Least length L of a program in which each rank waits for the forwards before it. y_r: seconds of a rank's layers,
    x_r: of all else; f_r >= φ y_r. The inequalities L >= φ Σ_{s<r} y_s + m y_r + m x_r are summed over r with weights
    q^(p - 1 - r), where q = 1 - φ/m, so that each y_r gets the factor m."""
    share = least.ratio
    q, head = 1 - share / m, sum(least.head)
    others = whole - least.layers - head  # the embedding, and the time for copies of weights
    return share / (1 - q**p) * (least.layers + head + q ** (p - 1) * others)
