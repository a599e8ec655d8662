"""How long a step takes, predicted: seconds of each action from sizes, a device and its links, and the schedule's
program as the clock.

    product [M, K] × [K, N]    the longer of 2·M·K·N / FLOP/s and its bytes / memory rate, and a kernel's launch
    core of attention          its products at `core_share` of that rate, causal ones half
    what is bound by memory    the bytes that the layer keeps (activations.py): written and read once in forward, and
                               three times in backward, with their gradients
    collectives                ring algorithms: bytes / rate + messages × latency (docs/layouts.md has the bytes)
    update                     16 bytes a number read and 12 written, in fp32, by the rank that owns it

Nothing overlaps but messages of the pipe axis, and ZeRO-3's gathers with computing, as in DeepSpeed. B: samples of a
micro-batch, S: tokens of a sample, D: hidden, V: vocabulary, t, d, p: ranks of the axes, m: micro-batches, v: chunks.
Next: rank_memory.py.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np

from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share
from megalite.pipeline.lengths import KINDS, Lengths
from megalite.pipeline.plan import PipelinePlan
from megalite.plan.activations import Forward, embedding_table, head_table, layer_table, total
from megalite.plan.devices import Device, Link

PARTS = ("products", "attention", "memory", "again", "tensor", "engine", "data", "expert")
"""What seconds are spent on. again: forward made again in backward; tensor, data, expert: collectives of the axes;
engine: sums of gradients and what DeepSpeed does around them."""
PRODUCTS, ATTENTION, MEMORY, AGAIN, TENSOR, ENGINE, DATA, EXPERT = range(len(PARTS))
FP32 = 4
PLAYED = 4  # micro-batches a rank that a program is played with; further ones take their busiest rank's time
HIDDEN = 0.5  # of the time of a pass, that hides ZeRO-3's messages, which take memory and processors from kernels
HOST_UPDATE = 4e8  # numbers a second that a rank's share of a host steps with offload_optimizer


def link_along(device: Device, size: int, spacing: int) -> Link:
    """The link of an axis of `size` ranks that are `spacing` apart. Where it crosses nodes, all ranks of a node that
    are on one line of it share their adapters."""
    members = max(1, device.node_ranks // spacing)
    if members >= size:
        return device.node
    rate = min(device.node.bytes_per_second, members * device.network.bytes_per_second)
    return Link(rate, device.network.seconds)


def ring_seconds(link: Link, size: int, whole: float, passes: int = 1) -> float:
    """Of a gather or scatter of `whole` bytes over `size` ranks; an all-reduce is two passes."""
    if size == 1:
        return 0.0
    messages = min(size - 1, 2 * math.ceil(math.log2(size)))  # rings, or trees where they are long
    return passes * (whole * (size - 1) / size / link.bytes_per_second + messages * link.seconds)


@dataclass(frozen=True, eq=False)
class Work:
    """What a rank of the tensor axis does for a micro-batch. at: sizes and type; recompute: as a Stage takes it."""

    spec: TransformerSpec
    device: Device
    tensor: int
    micro: int
    length: int
    dtype_bytes: int
    sequence: bool
    recompute: str
    counted: float = 1.0
    expert: int = 1

    @cached_property
    def at(self) -> Forward:
        """The micro-batch, as activations.py takes it."""
        import torch

        dtype = torch.bfloat16 if self.dtype_bytes == 2 else torch.float32
        axis = Axis(self.tensor, self.tensor - 1, tuple(range(self.tensor)), None)
        kind = "cpu" if self.device.cores else "cuda"
        split = Split(axis, self.sequence)
        return Forward(self.micro, self.length, dtype, split, False, kind, experts=self.expert)

    @property
    def tokens(self) -> int:
        return self.micro * self.length

    @property
    def hidden_bytes(self) -> int:
        """Of hidden states between the split products: what crosses the pipe axis."""
        return self.at.hidden(self.spec)

    def product(self, k: int, n: int, times: int = 1, matrices: int = 1) -> float:
        """Seconds of [tokens, k] × [k, n]. times: rows that a token makes; matrices: that they are spread over."""
        m, device = self.tokens * times, self.device
        moved = self.dtype_bytes * (m * k + matrices * k * n + m * n)
        seconds = max(2.0 * m * k * n / device.flops(self.dtype_bytes), moved / device.memory_rate)
        return seconds + device.launch_seconds

    def part(self, features: int, unit: int = 1) -> int:
        """Of features that the tensor axis splits, this rank's."""
        start, stop = share(features, self.at.split.axis, unit)
        return stop - start

    @cached_property
    def _link(self) -> Link:
        return link_along(self.device, self.tensor, 1)

    def exchange(self) -> float:
        """Seconds of an all-reduce of hidden states, or of the gather and scatter in its place."""
        whole = self.dtype_bytes * self.tokens * self.spec.hidden_size
        return ring_seconds(self._link, self.tensor, whole, passes=2)

    @cache  # noqa: B019  (a Work lives as long as the search)
    def layer(self, window: int | None, routed: bool = False) -> np.ndarray:
        """[kind F, B, I, W; part] of a layer that sees so many positions; routed: has experts."""
        spec, device = self.spec, self.device
        layer = next(
            i
            for i in range(spec.num_layers)
            if spec.window(i) == window and (spec.mixture_of(i) is not None) == routed
        )
        h = spec.head_size
        q, k = self.part(spec.num_heads * h, h), self.part(spec.num_kv_heads * h, h)
        d = spec.hidden_size
        shapes = [(d, q), (d, k), (d, k), (q, d)]
        products = sum(self.product(a, b) for a, b in shapes) + self._fed(layer)
        kept = total(layer_table(spec, layer, self.at))
        core_bytes = kept - total(layer_table(spec, layer, self.at, selective=True))
        core = self._core(q, window)
        result = np.zeros((len(KINDS), len(PARTS)))
        forward, backward, weights = result[0], result[2], result[3]
        forward[[PRODUCTS, ATTENTION, MEMORY]] = products, core, 2 * kept / device.memory_rate
        backward[[PRODUCTS, ATTENTION, MEMORY]] = (
            products,
            2.0 * core,
            3 * kept / device.memory_rate,
        )
        weights[PRODUCTS] = products
        forward[TENSOR] = backward[TENSOR] = 2 * self.exchange()
        if (mixture := spec.mixture_of(layer)) is not None:
            link, rows = link_along(device, self.expert, self.tensor), self.tokens * mixture.chosen
            there = ring_seconds(link, self.expert, self.dtype_bytes * rows * d)
            forward[EXPERT] = backward[EXPERT] = 2 * there
        for part in (forward, backward, weights):
            part[ENGINE] = device.layer_seconds
        if self.recompute == "full":
            backward[AGAIN] = forward.sum()
        elif self.recompute == "selective":
            backward[AGAIN] = core + 2 * core_bytes / device.memory_rate
        result[1] = backward + weights
        return result

    def _fed(self, layer: int) -> float:
        """Seconds of the products of the MLP or the experts in forward."""
        spec, d = self.spec, self.spec.hidden_size
        mixture = spec.mixture_of(layer)
        if mixture is None:
            f = self.part(spec.intermediate_size)
            return self.product(f, d) + self.product(d, f) * (2 if spec.gated else 1)
        f, own = self.part(mixture.intermediate_size), mixture.count // self.expert
        products = self.product(f, d, mixture.chosen, own)
        products += 2 * self.product(d, f, mixture.chosen, own)
        if mixture.shared_size:
            shared = self.part(mixture.shared_size)
            products += self.product(shared, d) + 2 * self.product(d, shared)
        if mixture.weighs_shared:
            products += self.product(d, 1)
        return products + self.product(d, mixture.count)

    def _core(self, queries: int, window: int | None) -> float:
        """Seconds of attention's two products in forward."""
        spec, s = self.spec, self.length
        seen = min(window or s, s)
        if spec.attention_dropout > 0:  # by hand, with all scores
            return 4.0 * self.tokens * s * queries / self.device.flops(self.dtype_bytes)
        average = seen - seen**2 / (2 * s) if spec.causal else seen
        flops = self.device.flops(self.dtype_bytes) * self.device.core_share
        return 4.0 * self.tokens * average * queries / flops + self.device.launch_seconds

    @cached_property
    def embedding(self) -> np.ndarray:
        """[kind, part] of looking up and of its gradient."""
        result = np.zeros((len(KINDS), len(PARTS)))
        hidden = self.dtype_bytes * self.tokens * self.spec.hidden_size
        table = self.dtype_bytes * self.part(self.spec.vocabulary_size) * self.spec.hidden_size
        kept = 2 * hidden + total(embedding_table(self.spec, self.at))
        result[0, MEMORY] = kept / self.device.memory_rate
        result[3, MEMORY] = (table + 2 * hidden) / self.device.memory_rate
        result[0, TENSOR] = self.exchange()
        result[1] = result[2] + result[3]
        return result

    @cached_property
    def head(self) -> np.ndarray:
        """[kind, part] of norm, product and loss, whose gradients are made in forward."""
        spec, result = self.spec, np.zeros((len(KINDS), len(PARTS)))
        columns = len(spec.labels) or self.part(spec.vocabulary_size)
        logits = self.tokens * columns * (self.dtype_bytes + FP32) * 3
        kept = total(head_table(spec, self.at))
        result[0, PRODUCTS] = 3 * self.counted * self.product(spec.hidden_size, columns)
        result[0, MEMORY] = (self.counted * logits + 2 * kept) / self.device.memory_rate
        result[0, TENSOR] = self.exchange()
        result[2, MEMORY] = 3 * self.hidden_bytes / self.device.memory_rate
        if spec.head_transform and spec.classifier is None:
            result[0, PRODUCTS] += self.product(spec.hidden_size, spec.hidden_size)
            result[2, PRODUCTS] += self.product(spec.hidden_size, spec.hidden_size)
            result[3, PRODUCTS] += self.product(spec.hidden_size, spec.hidden_size)
        result[1] = result[2] + result[3]
        return result

    @cached_property
    def layers(self) -> np.ndarray:
        """[layer + 1, kind, part]: sums of the layers before each."""
        spec = self.spec
        own = [
            self.layer(spec.window(layer), spec.mixture_of(layer) is not None)
            for layer in range(spec.num_layers)
        ]
        return np.concatenate([np.zeros((1, *own[0].shape)), np.cumsum(own, axis=0)])

    @cached_property
    def model(self) -> np.ndarray:
        """[kind, part] of the whole model."""
        return self.layers[-1] + self.embedding + self.head

    @cache  # noqa: B019
    def unevenness(self, pipe: int) -> float:
        """The longest rank's share of a pipe axis over an even one, at the least: layers are whole, and the head is on
        one rank."""
        layers, whole = self.spec.num_layers, self.model.sum()
        layer = self.layers[-1].sum() / layers
        head = self.head.sum() / layer
        longest = min(
            max(-(-(layers - own) // (pipe - 1)), own + head) for own in range(layers // pipe + 2)
        )
        return max(1.0, float(longest * layer * pipe / whole))


@dataclass(frozen=True)
class Sharing:
    """What the data axis adds. ranks: d; spacing: of them; zero: the stage; weights: numbers of a rank's (pipe, tensor)
    shard; offload: whether the optimizer is stepped in main memory; moments: tensors that it keeps of each weight."""

    ranks: int
    spacing: int
    zero: int
    offload: bool
    moments: int = 2

    def micro(self, work: Work, weights: float, several: bool) -> np.ndarray:
        """[kind, part] that a micro-batch adds for so many numbers of weights; several: micro-batches a step."""
        result, device, e = np.zeros((len(KINDS), len(PARTS))), work.device, work.dtype_bytes
        summed = (e + 2 * FP32) * weights / device.memory_rate if several or self.zero > 1 else 0.0
        result[1, ENGINE] = result[3, ENGINE] = summed + device.micro_seconds
        link = link_along(device, self.ranks, self.spacing)
        if self.zero >= 2:
            reduced = ring_seconds(link, self.ranks, FP32 * weights)
            result[1, DATA] = result[3, DATA] = reduced
        if self.zero == 3:
            # Layer by layer, beside computing, which hides a part of it.
            layers = work.spec.num_layers
            gathered = layers * ring_seconds(link, self.ranks, e * weights / layers)
            reduced = layers * ring_seconds(link, self.ranks, FP32 * weights / layers)
            hidden = HIDDEN * work.model.sum(axis=1)
            result[0, DATA] = max(0.0, gathered - hidden[0])
            result[1, DATA] = max(0.0, gathered + reduced - hidden[1])
        return result

    def end(self, work: Work, weights: float) -> dict[str, float]:
        """Seconds after a step's last backward, by part."""
        device, e, d = work.device, work.dtype_bytes, self.ranks
        link = link_along(device, d, self.spacing)
        owned = weights / d if self.zero else weights
        if self.offload:
            update = (FP32 + e) * owned / device.host.bytes_per_second + owned / HOST_UPDATE
        else:
            moved = FP32 * (2 + self.moments + 1 + self.moments) + e
            update = moved * owned / device.memory_rate
        sent = 0.0
        if self.zero == 0:
            sent = ring_seconds(link, d, FP32 * weights, passes=2)
        elif self.zero == 1:
            sent = ring_seconds(link, d, FP32 * weights)
        if self.zero in (1, 2):
            sent += ring_seconds(link, d, e * weights)
        return {"data": sent, "update": update + device.step_seconds}


@dataclass(frozen=True)
class StepTime:
    """seconds: of a step; parts: by what they are spent on, averaged over the ranks of the pipe axis: PARTS, `update`,
    and `bubble`; bubble: its share of the step."""

    seconds: float
    parts: dict[str, float]
    bubble: float


def hop_seconds(work: Work, pipe: int, data: int) -> float:
    """Of a message between neighbours on the pipe axis."""
    if pipe == 1:
        return 0.0
    link = work.device.node if data * work.tensor < work.device.node_ranks else work.device.network
    return link.seconds + work.hidden_bytes / link.bytes_per_second


@lru_cache(maxsize=256)
def lengths_of(plan: PipelinePlan, micro_batches: int) -> Lengths:
    """The plan's program, as a clock."""
    return Lengths(plan.program(micro_batches))


def played_micro_batches(plan: PipelinePlan, micro_batches: int) -> int:
    """How many micro-batches of a step are played; what a rank holds does not grow after them."""
    return min(micro_batches, PLAYED * plan.pipe)


def step_time(
    work: Work, plan: PipelinePlan, sharing: Sharing, micro_batches: int, weights: list[float]
) -> StepTime:
    """weights: numbers of each rank of the pipe axis."""
    chunks = [
        chunk_seconds(work, plan, chunk, sharing, weights, micro_batches > 1)
        for chunk in range(len(plan.cut.home))
    ]
    totals = [chunk.sum(axis=1) for chunk in chunks]
    played = played_micro_batches(plan, micro_batches)
    lengths = lengths_of(plan, played)
    kinds = {kind: number for number, kind in enumerate(KINDS)}
    hop = hop_seconds(work, plan.pipe, sharing.ranks)
    length = lengths.of(lambda kind, chunk: float(totals[chunk][kinds[kind]]), hop)
    # By rank and part, of one micro-batch.
    busy = np.zeros((plan.pipe, len(PARTS)))
    for chunk, home in enumerate(plan.cut.home):
        busy[home] += (lengths.counts[:, chunk, None] * chunks[chunk]).sum(axis=0) / played
    length += (micro_batches - played) * float(busy.sum(axis=1).max())
    all_busy = float(busy.sum()) * micro_batches
    cores = work.device.cores
    if cores:  # ranks that share cores: what one leaves idle another uses
        length = max(length, all_busy * sharing.ranks * work.tensor / cores)
    parts: dict[str, float] = {}
    parts |= zip(PARTS, (busy.mean(axis=0) * micro_batches).tolist(), strict=True)
    parts["bubble"] = max(0.0, length - sum(parts.values()))  # of one rank -1e-16, by rounding
    end = sharing.end(work, max(weights))
    parts["data"] += end["data"]
    parts["update"] = end["update"]
    seconds = length + sum(end.values())
    return StepTime(seconds, parts, parts["bubble"] / seconds)


def chunk_seconds(
    work: Work,
    plan: PipelinePlan,
    chunk: int,
    sharing: Sharing,
    weights: list[float],
    several: bool,
) -> np.ndarray:
    """[kind, part] of a chunk's actions."""
    layers, home = plan.cut.layers[chunk], plan.cut.home[chunk]
    result = work.layers[layers.stop] - work.layers[layers.start]
    if chunk == 0:
        result = result + work.embedding
    if chunk == plan.cut.last_chunk:
        result = result + work.head
    own = weights[home] / plan.cut.home.count(home)
    return result + sharing.micro(work, own, several)


BUBBLES = {  # of ranks' times f, i, w of a micro-batch: what a rank waits, times (p - 1)
    "1f1b": lambda f, i, w, v: f + i + w,
    "interleaved": lambda f, i, w, v: (f + i + w) / v,
    "zb-h1": lambda f, i, w, v: max(0.0, f + i - w),
    "zb-v": lambda f, i, w, v: f / 2,
}


def estimated_seconds(
    work: Work,
    schedule: str,
    pipe: int,
    chunks: int,
    sharing: Sharing,
    micro_batches: int,
    weights: float,
) -> float:
    """As `step_time`, with a cut into equal parts and the schedule's formula (docs/layouts.md) for its bubble: what
    layouts are sorted by before their programs are played. weights: numbers of a rank."""
    # A backward in halves gives the engine its gradients once, in W.
    added = sharing.micro(work, weights, micro_batches > 1).sum(axis=1)
    f, b, i, w = (work.model.sum(axis=1) / pipe + added).tolist()
    if not schedule.startswith("zb"):
        i, w = b / 2, b / 2
    length = micro_batches * (f + i + w)
    if pipe > 1:
        length *= work.unevenness(pipe)
        length += (pipe - 1) * BUBBLES[schedule](f, i, w, chunks)
    if work.device.cores:
        ranks = pipe * sharing.ranks * work.tensor
        length = max(length, micro_batches * (f + i + w) * ranks / work.device.cores)
    return length + sum(sharing.end(work, weights).values())
