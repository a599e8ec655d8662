"""Less than which no program of a layout can take, in seconds.

A bound for every cut of the layers into chunks, so that neither a cut need be searched nor a program be played. p ranks
of the pipe axis, m micro-batches, v chunks a rank; f, b: forward and backward of a rank, T = f + b (I and W together
where backwards are halved), so that ΣT does not depend on the cut. A path through a program is a bound of its length,
whatever the costs:

    any rank r        it starts after the forwards before it and has m T_r to do: Σ_{s<r} f_s + m T_r, and where its
                      last action is a B, those of the ranks before it follow: Σ_{s<r} T_s + m T_r
    1F1B, any rank r  the first micro-batch to the last rank and back, all of the rank's work but what it did in
                      between, the last micro-batch to the last rank and back: ΣT + (m - 1 - w) T_r + Σ_{s>r} T_s,
                      where w = p - 1 - r micro-batches are ahead of their backwards
    1F1B, any rank r  one of the two ways alone: ΣT + (m - 1) T_r - w f_r

Of 1F1B with m > p the second, for all ranks together, is least where all T_r are equal: (m + p - 1) ΣT / p, the
formula of an even cut. For the others the first is taken for all ranks together. Layers are whole, and the head is on
one rank. tests/unit/plan/test_plan.py holds the bound against every layout of small worlds.
Next: least_memory.py, the same of bytes.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from megalite.plan.step_time import PLAYED
from megalite.plan.work import BACKWARD, FORWARD, Work


@dataclass(frozen=True, eq=False)
class LeastWork:
    """Seconds of a Work that bounds are made of. model: [kind] of the whole model; forward, backward: least of a layer;
    layers: of all; head: forward and backward."""

    work: Work

    @cached_property
    def model(self) -> np.ndarray:
        return self.work.model.sum(axis=1)

    @cached_property
    def whole(self) -> float:
        """Forward and backward of the whole model."""
        return float(self.model[[FORWARD, BACKWARD]].sum())

    @cached_property
    def upto(self) -> np.ndarray:
        """[layer + 1, kind]: of the layers before each."""
        return self.work.layers.sum(axis=2)

    @cached_property
    def embedding(self) -> np.ndarray:
        """[kind]"""
        return self.work.embedding.sum(axis=1)

    @cached_property
    def end(self) -> np.ndarray:
        """[kind] of the head."""
        return self.work.head.sum(axis=1)

    @cached_property
    def _by_layer(self) -> np.ndarray:
        """[layer, kind]"""
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
        """(forward, backward)"""
        return float(self.end[FORWARD]), float(self.end[BACKWARD])

    @cache  # noqa: B019  (a LeastWork lives as long as the search)
    def longest(self, p: int) -> float:
        """Of a micro-batch on the longest of p ranks: layers are whole, and the head is on one rank."""
        own, rest = _whole_layers(self.work.spec.num_layers, p)
        layer = self.forward + self.backward
        uneven = float(np.maximum(rest * layer, own * layer + sum(self.head)).min())
        return max(uneven, self.whole / p)

    @cached_property
    def ratio(self) -> float:
        """The least share of forward in a layer's time."""
        times = self._by_layer
        return float((times[:, FORWARD] / (times[:, FORWARD] + times[:, BACKWARD])).min())


def least_length(least: LeastWork, schedule: str, p: int, m: int, whole: float) -> float:
    """Of the program of m micro-batches. whole: ΣT. Those that are not played take their longest rank's time."""
    played = min(m, PLAYED * p)
    layers, layer = least.work.spec.num_layers, least.forward + least.backward
    # Three bounds: of a rank without the head and of the one with it, for each number of layers that this one may
    # have, and of all ranks together.
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
        # The chunks that a rank starts with have a layer or more each.
        first = least.forward
        if schedule == "interleaved":
            first = layer
            of_last = of_last + (p - 1) * layer
        together = m * whole / p + first * (p - 1) / 2
        # So many ranks have `rest` layers where none has more; the last of them waits for those before it.
        many = np.maximum(1, layers - own - (p - 1) * (rest - 1))
        of_rest = of_rest + np.minimum(m * layer, (many - 1) * first)
    return max(together, float(np.maximum(of_rest, of_last).min()))


def _whole_layers(layers: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of layers that the last rank may have (zb-v: the one with both ends), and for each of them the fewest
    that one of the other ranks then has."""
    own = np.arange(layers // p + 2)
    return own, np.ceil((layers - own) / (p - 1))


def _few(whole: float, p: int, m: int) -> float:
    """Of 1F1B with m <= p. The second path takes the last m - 1 ranks, ΣT over them <= L - ΣT, the first one the
    others: T_r <= (L - Σ_{s<r} T_s) / m in turn, ΣT over them <= L (1 - (1 - 1/m)^(p + 1 - m))."""
    return 2 * whole / (2 - (1 - 1 / m) ** (p + 1 - m))


def _waiting(least: LeastWork, p: int, m: int, whole: float) -> float:
    """Of a program whose ranks wait for the forwards before them. y_r: time of the layers of a rank, x_r of all else,
    f_r >= φ y_r. The sum over r of q^(p - 1 - r) times L >= φ Σ_{s<r} y_s + m y_r + m x_r, with q = 1 - φ/m, has the
    factor m for each y_r."""
    share = least.ratio
    q, head = 1 - share / m, sum(least.head)
    others = whole - least.layers - head  # the embedding, and what copies of weights add
    return share / (1 - q**p) * (least.layers + head + q ** (p - 1) * others)
