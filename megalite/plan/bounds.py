"""Less than which a layout cannot take, of time and of memory: what the search leaves layouts out by.

Both are bounds for every cut of the layers into chunks, so that neither a cut need be searched nor a program be played.
p ranks of the pipe axis, m micro-batches, v chunks a rank; f, b: forward and backward of a rank, T = f + b (I and W
together where backwards are halved), so that ΣT does not depend on the cut. A path through a program is a bound of its
length, whatever the costs:

    any rank r        it starts after the forwards before it and has m T_r to do: Σ_{s<r} f_s + m T_r, and where its
                      last action is a B, those of the ranks before it follow: Σ_{s<r} T_s + m T_r
    1F1B, any rank r  the first micro-batch to the last rank and back, all of the rank's work but what it did in
                      between, the last micro-batch to the last rank and back: ΣT + (m - 1 - w) T_r + Σ_{s>r} T_s,
                      where w = p - 1 - r micro-batches are ahead of their backwards
    1F1B, any rank r  one of the two ways alone: ΣT + (m - 1) T_r - w f_r

Of 1F1B with m > p the second, for all ranks together, is least where all T_r are equal: (m + p - 1) ΣT / p, the
formula of an even cut. For the others the first is taken for all ranks together. Layers are whole, and the head is on
one rank. tests/unit/plan/test_plan.py holds both bounds against every layout of small worlds.
Next: search.py.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS, moments_kept
from megalite.pipeline.lengths import KINDS
from megalite.pipeline.steps import AHEAD
from megalite.plan.activations import (
    ChunkPart,
    head_table,
    layer_table,
    logits_bytes,
    made_again,
    total,
    waiting_table,
)
from megalite.plan.candidates import Candidate, Search
from megalite.plan.devices import FRAGMENTS, OVERHEAD_BYTES, Device
from megalite.plan.states import DTYPES
from megalite.plan.step_time import PLAYED, Held, Sharing, Work

FP32 = 4
FORWARD, BACKWARD, INPUT, WEIGHT = range(len(KINDS))


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
    own, rest = _whole_layers(layers, p)
    of_rest, of_last = m * rest * layer, m * (own * layer + sum(least.head))
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
    else:  # the chunks that a rank starts with have a layer or more each
        first = layer if schedule == "interleaved" else least.forward
        together = m * whole / p + first * (p - 1) / 2
        of_last = of_last + (p - 1) * layer * (schedule == "interleaved")
        # So many ranks have `rest` layers where none has more; the last of them waits for those before it.
        many = np.maximum(1, layers - own - (p - 1) * (rest - 1))
        of_rest = of_rest + np.minimum(m * layer, (many - 1) * first)
    return max(together, float(np.maximum(of_rest, of_last).min()))


def _whole_layers(layers: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """Layers that the last rank has (zb-v: the one with both ends), and for each such number those that one of the
    other ranks has at the least."""
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
        kinds = {(spec.window(i), spec.mixture_of(i) is not None, i == 0): i for i in layers}
        selective = recompute == "selective"
        every = {"none": 0, "selective": 0, "full": 1}.get(recompute)
        every = int(recompute) if every is None else every
        again = 0
        if every:
            layer = at.hidden(spec) / every
            again = min(made_again(spec, layers[i : i + 1], every, at) for i in kinds.values())
        else:
            layer = min(total(layer_table(spec, i, at, selective)) for i in kinds.values())
        parts = [ChunkPart(layers[i : i + 1], False, False) for i in kinds.values()]
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
        shared = self.stands + gradients * self.gradient
        return (
            shared * held.shared
            + (self.stands_routed + gradients * self.gradient_routed) * held.routed
        )


@dataclass(eq=False)
class Bounds:
    """Of the layouts of a search on a device."""

    search: Search
    device: Device
    _works: dict[tuple[object, ...], Work] = field(default_factory=dict, init=False, repr=False)
    _least: dict[Work, LeastWork] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[tuple[Work, str], LeastKept] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[tuple[int, int], Held] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def dtype_bytes(self) -> int:
        """Of a number of weights and activations."""
        return DTYPES[self.search.config.precision].itemsize

    @cached_property
    def moments(self) -> int:
        """Tensors that the optimizer keeps of each weight."""
        optimizer = self.search.config.document.optimizer
        return 2 if optimizer is None else moments_kept(optimizer)

    def work_of(self, one: Candidate) -> Work:
        """What a micro-batch of a candidate is."""
        recompute = "full" if one.recompute.isdigit() else one.recompute
        key = one.tensor, one.context, one.attention, one.expert, one.micro, one.sequence, recompute
        if key not in self._works:
            data = self.search.config.data
            self._works[key] = Work(
                self.search.spec,
                self.device.among(self.search.world_size),
                one.tensor,
                one.micro,
                data.sequence_length,
                self.dtype_bytes,
                one.sequence,
                recompute,
                data.counted_share,
                one.expert,
                one.context,
                one.attention == "heads",
                data.reset_attention,
                self.search.config.precision == "fp16",
                self.search.config.train.compile,
            )
        return self._works[key]

    def least_of(self, one: Candidate) -> LeastWork:
        """What bounds of its time are made of."""
        work = self.work_of(one)
        if work not in self._least:
            self._least[work] = LeastWork(work)
        return self._least[work]

    def kept_of(self, one: Candidate) -> LeastKept:
        """What bounds of its memory are made of."""
        key = self.work_of(one), one.recompute
        if key not in self._kept:
            self._kept[key] = LeastKept.of(*key)
        return self._kept[key]

    def sharing(self, one: Candidate) -> Sharing:
        """What the copies of a candidate's weights add."""
        data, offload = self.search.data(one), one.offload != "none"
        own = one.context, one.expert, self._bucket_numbers
        return Sharing(data, one.tensor, one.zero, offload, self.moments, *own)

    def micro_batches(self, one: Candidate) -> int:
        """Of a step."""
        return self.search.batch // (self.search.data(one) * one.micro)

    def weights(self, one: Candidate) -> Held:
        """Numbers of a rank at the least, the mean of the pipe axis."""
        ranks = one.pipe * one.tensor
        routed = self.search.spec.expert_parameters if one.expert > 1 else 0
        return Held((self._parameters - routed) / ranks, routed / one.expert / ranks)

    @cached_property
    def _parameters(self) -> int:
        return self.search.spec.num_parameters

    def least_seconds(self, one: Candidate, evenly: bool = False) -> float:
        """Of a step; evenly: of any schedule, whose ranks never wait."""
        least, m, p, chunks = self.least_of(one), self.micro_batches(one), one.pipe, one.chunks
        sharing, held = self.sharing(one), self.weights(one)
        added = chunks * sharing.micro(least.work, held.part(chunks), m > 1).sum(axis=1)
        whole = least.whole + p * float(added[[FORWARD, BACKWARD]].sum())
        world = self.search.world_size
        shared = self.device.ranks_a_core(world)
        if p == 1 or evenly:
            length = m * max(whole / p, least.longest(p) if p > 1 else 0.0)
        else:
            length = least_length(least, one.schedule, p, m, whole)
        length = max(length, shared * m * whole / p)
        length /= self.device.pipe_share if p > 1 else 1.0
        return length + shared * sum(sharing.end(least.work, held, world).values())

    def least_bytes(self, one: Candidate) -> float:
        """Of the largest rank: where its forwards keep most, and at the end of the last backward, where all gradients
        are there."""
        gradients = self._has_gradients(one)
        bucket = self.bucket_bytes(one)
        kept = self._least_level(one, gradients, self.kept_of(one))
        kept += bucket if one.zero == 1 and gradients else 0
        return self.fixed_bytes(one) + max(kept, self._least_level(one, True, None) + bucket)

    def _has_gradients(self, one: Candidate) -> bool:
        """Whether all gradients are there when the forwards of a step's last micro-batches keep most, at the least."""
        m = self.micro_batches(one)
        return m > one.pipe and (one.pipe == 1 or one.schedule == "1f1b")

    def _least_level(self, one: Candidate, gradients: bool, kept: LeastKept | None) -> float:
        """States and what is kept, None: nothing. Where the ranks of the pipe axis hold E_r + n_r k_r with n_r layers
        each, that is as much as each holds where all are equal: (layers + ΣE_r/k_r) / Σ1/k_r."""
        spec, p = self.search.spec, one.pipe
        of_layer, of_head, again, hidden = 0.0, 0.0, 0.0, 0.0
        if kept is not None:
            of_layer, of_head, again, hidden = kept.layer, kept.of_head, kept.again, kept.hidden
        if p == 1:
            states = self.rates(one).of(self.weights(one), gradients)
            return states + of_layer * spec.num_layers + of_head
        first, each, last = self.state_bytes(one, gradients)
        counts = np.array(_held(one, self.micro_batches(one)))
        by_layer, beside = each + of_layer * counts, np.full(p, float(again))
        if one.schedule == "zb-v":  # both ends are on the first rank
            beside[0] = of_head + first + last
        else:  # whose chunk may be the head alone
            beside[0] += first
            beside[-1] = 0.0 if kept is None else kept.head + kept.logits
            beside[-1] += last
        level = (spec.num_layers + (beside / by_layer).sum()) / (1 / by_layer).sum()
        return (AHEAD + 1) * hidden + float(level)

    def layer_numbers(self, one: Candidate) -> Held:
        """Numbers of the weights of the smallest layer on a rank."""
        key = one.tensor, one.expert
        if key not in self._layers:
            spec, sizes = self.search.spec, []
            for layer in range(spec.num_layers):
                routed, mixture = 0.0, spec.mixture_of(layer)
                if mixture is not None and one.expert > 1:
                    routed = spec.expert_parameters / len(mixture.layers)
                shared = spec.layer_parameters(layer) - routed
                shared -= 4 * spec.norm_parameters  # a layer may lack some of its norms
                sizes.append(Held(shared / one.tensor, routed / one.expert / one.tensor))
            self._layers[key] = Held(*(min(numbers) for numbers in zip(*sizes, strict=True)))
        return self._layers[key]

    def table_numbers(self, one: Candidate) -> tuple[float, float]:
        """Numbers of the weights of the embedding, and of the head beside it."""
        spec = self.search.spec
        table = spec.vocabulary_size * spec.hidden_size / one.tensor
        together = one.pipe == 1 or one.schedule == "zb-v"
        return table, 0.0 if spec.labels or (spec.tied and together) else table

    def state_bytes(self, one: Candidate, gradients: bool) -> tuple[float, float, float]:
        """Of the embedding, of the smallest layer, and of the head; with gradients or without."""
        rates, (first, last) = self.rates(one), self.table_numbers(one)
        layer = rates.of(self.layer_numbers(one), gradients)
        return rates.of(Held(first), gradients), layer, rates.of(Held(last), gradients)

    def rates(self, one: Candidate) -> Rates:
        """Of a candidate's states."""
        away = one.offload == "nvme" or (one.offload != "none" and not self.device.cores)
        optimizer = 0 if away else FP32 * (self.moments + (one.zero > 0))
        width, ranks = self.dtype_bytes, self.search.data(one) * one.context

        def of(copies: float) -> tuple[float, float]:
            weight = width / copies if one.zero == 3 else width
            gradient = FP32 if one.zero < 2 else FP32 / copies
            stands = weight + (optimizer / copies if one.zero else optimizer)
            return (stands + gradient, 0.0) if one.zero == 3 else (stands, gradient)

        return Rates(*of(ranks), *of(ranks / one.expert))

    def fixed_bytes(self, one: Candidate) -> float:
        """Of what does not depend on the layers, and is there all the time."""
        if self.device.cores:
            return 0.0
        return OVERHEAD_BYTES + FRAGMENTS * self.device.memory_bytes

    def bucket_bytes(self, one: Candidate) -> float:
        """Of the bucket of reductions, which is there at the end of each backward."""
        if self.device.cores:
            return 0.0
        zero = self.search.config.document.zero_optimization
        if one.zero == 0 or (zero is not None and zero.contiguous_gradients is False):
            return 0.0
        return self._bucket_numbers * (self.dtype_bytes if one.zero == 2 else FP32)

    @cached_property
    def _bucket_numbers(self) -> int:
        zero = self.search.config.document.zero_optimization
        given = None if zero is None else zero.reduce_bucket_size
        return max(1, REDUCE_BUCKET_ELEMENTS if given is None else given)


def _held(one: Candidate, micro_batches: int) -> list[int]:
    """Micro-batches whose layers each rank of the pipe axis keeps at once, at the least."""
    p = one.pipe
    match one.schedule:
        case "interleaved":  # before its first backward, of the chunk of which it has fewest
            return [min(p, 2 * (p - 1 - rank) + 1) for rank in range(p)]
        case "zb-v":
            return [1] * p
    return [min(micro_batches, p - rank) for rank in range(p)]
