"""How long a step takes, predicted: seconds of each action from sizes, a device and its links, and the schedule's
program as the clock.

    product [M, K] × [K, N]    the longer of 2·M·K·N / FLOP/s and its bytes / memory rate, and a kernel's launch
    core of attention          its products at `core_share` of that rate, causal ones half
    what is bound by memory    the bytes that the layer keeps (activations.py): written and read once in forward, and
                               three times in backward, with their gradients
    collectives                ring algorithms: bytes / rate + messages × latency (docs/layouts.md has the bytes)
    context axis               keys and values of whole samples gathered, or heads exchanged for tokens, in each layer
    expert axis                rows on their way to their experts and back, spread evenly
    update                     16 bytes a number read and 12 written, in fp32, by the rank that owns it

Nothing overlaps but messages of the pipe axis, and ZeRO-3's gathers with computing, as in DeepSpeed. B: samples of a
micro-batch, S: tokens of a sample, D: hidden, V: vocabulary, t, c, e, d, p: ranks of the axes, m: micro-batches, v:
chunks.
Next: rank_memory.py.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share
from megalite.pipeline.lengths import KINDS, Lengths
from megalite.pipeline.plan import PipelinePlan
from megalite.plan.activations import Forward, embedding_table, head_table, layer_table, total
from megalite.plan.devices import Device, Link

PARTS = (
    "products", "attention", "memory", "again", "tensor", "engine", "data", "expert", "context",
)  # fmt: skip
"""What seconds are spent on. again: forward made again in backward; tensor, data, expert, context: collectives of the
axes; engine: sums of gradients and what DeepSpeed does around them."""
PRODUCTS, ATTENTION, MEMORY, AGAIN, TENSOR, ENGINE, DATA, EXPERT, CONTEXT = range(len(PARTS))
FP32 = 4
PLAYED = 4  # micro-batches a rank that a program is played with; further ones take their busiest rank's time
HIDDEN = 0.5  # of the time of a pass, that hides ZeRO-3's messages, which take memory and processors from kernels
SOON = 5e8  # of ZeRO-3's weights, that stay between forward and backward (rank_memory.py)
COPIED_BYTES = 40  # read and written: into a bucket, divided, flat for sending, to what is owned, flat for the update
HOST_UPDATE = 4e8  # numbers a second that a rank's share of a host steps with offload_optimizer


def link_along(device: Device, size: int, spacing: int) -> Link:
    """The link of an axis of `size` ranks that are `spacing` apart."""
    return link_of(device, size, max(1, device.node_ranks // spacing))


@cache
def link_of(device: Device, size: int, members: int) -> Link:
    """The link of a group of `size` ranks, of which as many as `members` are in one node. Where it crosses nodes, those
    share their adapters."""
    if members >= size:
        return device.node
    rate = min(device.node.bytes_per_second, members * device.network.bytes_per_second)
    return replace(device.network, bytes_per_second=rate)


def ring_seconds(
    link: Link, size: int, whole: float, passes: int = 1, byte: float = 1.0, calls: float = 0.0
) -> float:
    """Of a gather or scatter of `whole` bytes over `size` ranks; an all-reduce is two passes. byte: how many times as
    long a byte takes, of Link; calls: messages, where not those of a ring."""
    if size == 1:
        return 0.0
    # Rings, or trees where they are long.
    messages = calls or passes * min(size - 1, 2 * math.ceil(math.log2(size)))
    sent = passes * whole * (size - 1) / size
    return byte * sent / link.bytes_per_second + messages * link.seconds


def gather_seconds(link: Link, size: int, whole: float) -> float:
    """Of an all-gather."""
    return ring_seconds(link, size, whole, byte=link.gather)


def scatter_seconds(link: Link, size: int, whole: float) -> float:
    """Of a reduce-scatter."""
    return ring_seconds(link, size, whole, byte=link.scatter)


def owners_seconds(link: Link, size: int, whole: float, buckets: float = 1.0) -> float:
    """Of reducing as many bytes in so many buckets, the part of each rank in a call of its own."""
    return ring_seconds(link, size, whole, byte=link.reduce, calls=size * buckets)


@dataclass(frozen=True, eq=False)
class Work:
    """What a rank of the tensor and context axes does for a micro-batch. length: of a whole sample; at: sizes and type;
    recompute: as a Stage takes it; by_heads: whether the context axis exchanges heads for tokens; documents: whether
    samples' documents are kept apart; compiled: `megalite.train.compile`."""

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
    context: int = 1
    by_heads: bool = False
    documents: bool = False
    fp16: bool = False
    compiled: bool = False

    @cached_property
    def at(self) -> Forward:
        """The micro-batch, as activations.py takes it."""
        import torch

        dtype = torch.float16 if self.fp16 else torch.bfloat16
        dtype = dtype if self.dtype_bytes == 2 else torch.float32
        axis = Axis(self.tensor, self.tensor - 1, tuple(range(self.tensor)), None)
        kind = "cpu" if self.device.cores else "cuda"
        return Forward(
            self.micro,
            self.length // self.context,
            dtype,
            Split(axis, self.sequence),
            self.documents,
            kind,
            self.context,
            self.by_heads,
            self.expert,
            self.compiled,
        )

    @property
    def tokens(self) -> int:
        """That the rank has."""
        return self.micro * self.length // self.context

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
        if not self.sequence:
            return ring_seconds(self._link, self.tensor, whole, passes=2)
        gathered = gather_seconds(self._link, self.tensor, whole)
        return gathered + scatter_seconds(self._link, self.tensor, whole)

    @cached_property
    def _mixed(self) -> list[float]:
        """Bytes of what each message of a layer's forward on the context axis gathers or exchanges; those of backward
        are as large (docs/layouts.md, "Long samples")."""
        spec, h, e = self.spec, self.spec.head_size, self.dtype_bytes
        queries, keys = self.part(spec.num_heads * h, h), self.part(spec.num_kv_heads * h, h)
        if not self.by_heads:
            return [e * 2.0 * self.micro * self.length * keys]
        keys = max(keys, self.context * h)  # a head for each rank
        return [e * self.tokens * (queries + 2.0 * keys), e * self.tokens * float(queries)]

    @cached_property
    def mixing(self) -> float:
        """Seconds of them."""
        link = link_along(self.device, self.context, self.tensor)
        seconds = ring_seconds if self.by_heads else gather_seconds
        return sum(seconds(link, self.context, whole) for whole in self._mixed)

    @property
    def mixed_bytes(self) -> float:
        """That a rank sends of them."""
        return sum(self._mixed) * (self.context - 1) / self.context

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
        forward[CONTEXT] = backward[CONTEXT] = self.mixing
        if (mixture := spec.mixture_of(layer)) is not None:
            link = link_along(device, self.expert, self.context * self.tensor)
            rows = self.tokens * mixture.chosen
            there = ring_seconds(link, self.expert, self.dtype_bytes * rows * d)
            forward[EXPERT] = backward[EXPERT] = 2 * there
        for part in (forward, backward, weights):
            part[ENGINE] = device.layer_seconds
        if self.recompute == "full":
            backward[AGAIN] = forward.sum()
        elif self.recompute == "selective":
            backward[AGAIN] = core + 2 * core_bytes / device.memory_rate + self.mixing
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
        """Seconds of attention's two products in forward: of a rank's tokens with all heads, or with by_heads of all
        tokens with its heads, which is as much."""
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


class Held(NamedTuple):
    """Numbers of a rank's weights. routed: of experts that an expert axis divides; shared: all others."""

    shared: float
    routed: float = 0.0

    def part(self, chunks: int) -> "Held":
        """A chunk's, of so many that are alike."""
        return Held(self.shared / chunks, self.routed / chunks)


@dataclass(frozen=True)
class Sharing:
    """What the copies of a weight add, which are along data and context. data, context, expert, tensor: ranks of the
    axes; zero: the stage; offload: whether the optimizer is stepped in main memory; moments: tensors that it keeps of
    each weight; bucket: numbers that are reduced at a time."""

    data: int
    tensor: int
    zero: int
    offload: bool = False
    moments: int = 2
    context: int = 1
    expert: int = 1
    bucket: int = REDUCE_BUCKET_ELEMENTS

    @property
    def ranks(self) -> int:
        """That hold a copy of a weight, over which ZeRO shards."""
        return self.data * self.context

    def _lines(self, device: Device, held: Held) -> list[tuple[Link, int, float]]:
        """(link, ranks, numbers) of the groups that hold copies."""
        lines = [(link_along(device, self.ranks, self.tensor), self.ranks, held.shared)]
        if self.expert > 1:
            # Runs of neighbours along context, one for every run of the expert axis.
            run = min(self.context, max(1, device.node_ranks // self.tensor))
            apart = self.tensor * self.context * self.expert
            members, size = run * max(1, device.node_ranks // apart), self.ranks // self.expert
            lines.append((link_of(device, size, members), size, held.routed))
        return lines

    def micro(self, work: Work, held: Held, several: bool) -> np.ndarray:
        """[kind, part] that a micro-batch adds for so many numbers of weights; several: micro-batches a step."""
        result, device, e = np.zeros((len(KINDS), len(PARTS))), work.device, work.dtype_bytes
        numbers, lines = sum(held), self._lines(device, held)
        summed = (e + 2 * FP32) * numbers / device.memory_rate if several or self.zero > 1 else 0.0
        if device.gradient_rate:
            summed += e * numbers / device.gradient_rate
        if self.zero > 1:
            summed += self._copied(device, numbers)
        result[1, ENGINE] = result[3, ENGINE] = summed + device.micro_seconds
        if self.zero == 2:
            result[1, DATA] = result[3, DATA] = self._reduced(lines)
        if self.zero == 3:
            # Layer by layer, beside computing, which hides a part of it. There is no expert axis.
            layers, (link, size, _) = work.spec.num_layers, lines[0]
            gathered = layers * gather_seconds(link, size, e * numbers / layers)
            reduced = layers * scatter_seconds(link, size, FP32 * numbers / layers)
            # What is gathered for forward stays for backward, where that comes soon.
            again = max(0.0, numbers - SOON) / max(1.0, numbers)
            # Cores that pass messages on compute nothing meanwhile.
            hidden = (0.0 if device.cores else HIDDEN) * work.model.sum(axis=1)
            hooks = layers * device.gather_seconds
            result[0, DATA] = max(0.0, gathered - hidden[0]) + hooks
            result[1, DATA] = max(0.0, again * gathered + reduced - hidden[1]) + hooks
        return result

    def _copied(self, device: Device, numbers: float) -> float:
        """Seconds in which gradients are copied from one buffer to another on their way to their owner and the
        update."""
        return COPIED_BYTES * numbers / (device.reduce_rate or device.memory_rate)

    def _reduced(self, lines: list[tuple[Link, int, float]]) -> float:
        """Seconds in which ZeRO-1 and 2 reduce."""
        return sum(
            owners_seconds(link, size, FP32 * count, 1 + count / self.bucket)
            for link, size, count in lines
        )

    def end(self, work: Work, held: Held, world: int = 1) -> dict[str, float]:
        """Seconds after a step's last backward, by part. world: ranks in all, which sum a few numbers twice: the tokens
        that count, and the norm."""
        device, e, lines = work.device, work.dtype_bytes, self._lines(work.device, held)
        owned = sum(count / size if self.zero else count for _, size, count in lines)
        if self.offload:
            update = (FP32 + e) * owned / device.host.bytes_per_second + owned / HOST_UPDATE
        else:
            moved = FP32 * (2 + self.moments + 1 + self.moments) + e
            update = moved * owned / (device.states_rate or device.memory_rate)
        sent = 0.0
        for link, size, count in lines:
            if self.zero == 0:
                sent += ring_seconds(link, size, FP32 * count, passes=2)
            elif self.zero < 3:
                sent += gather_seconds(link, size, e * count)
        sent += self._reduced(lines) if self.zero == 1 else 0.0
        copied = self._copied(device, sum(held)) if self.zero == 1 else 0.0
        sent += 2 * ring_seconds(link_along(device, world, 1), world, 0.0, passes=2)
        return {"data": sent, "engine": copied, "update": update + device.step_seconds}


@dataclass(frozen=True)
class StepTime:
    """seconds: of a step; parts: by what they are spent on, averaged over the ranks of the pipe axis: PARTS, `update`,
    and `bubble`; bubble: its share of the step."""

    seconds: float
    parts: dict[str, float]
    bubble: float


def hop_seconds(work: Work, pipe: int, copies: int) -> float:
    """Of a message between neighbours on the pipe axis. copies: ranks that hold a weight."""
    if pipe == 1:
        return 0.0
    near = copies * work.tensor < work.device.node_ranks
    link = work.device.node if near else work.device.network
    return link.seconds + link.send * work.hidden_bytes / link.bytes_per_second


@lru_cache(maxsize=256)
def lengths_of(plan: PipelinePlan, micro_batches: int) -> Lengths:
    """The plan's program, as a clock."""
    return Lengths(plan.program(micro_batches))


def played_micro_batches(plan: PipelinePlan, micro_batches: int) -> int:
    """How many micro-batches of a step are played; what a rank holds does not grow after them."""
    return min(micro_batches, PLAYED * plan.pipe)


def step_time(
    work: Work, plan: PipelinePlan, sharing: Sharing, micro_batches: int, weights: list[Held]
) -> StepTime:
    """weights: numbers of each rank of the pipe axis."""
    chunks = [
        chunk_seconds(work, plan, chunk, sharing, weights, micro_batches > 1)
        for chunk in range(len(plan.cut.home))
    ]
    if plan.pipe > 1:
        chunks = [chunk / work.device.pipe_share for chunk in chunks]
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
    # Ranks that share cores: what one leaves idle another uses, so a step takes all their work over the cores at least.
    ranks = plan.pipe * sharing.ranks * work.tensor
    shared = work.device.ranks_a_core(ranks)
    parts: dict[str, float] = {}
    spent = busy.mean(axis=0) * micro_batches * shared
    length = max(length, float(spent.sum()))
    parts |= zip(PARTS, spent.tolist(), strict=True)
    parts["bubble"] = max(0.0, length - sum(parts.values()))  # of one rank -1e-16, by rounding
    ends = [sharing.end(work, held, ranks) for held in dict.fromkeys(weights)]
    longest = max(ends, key=lambda end: sum(end.values()))
    end = {part: shared * seconds for part, seconds in longest.items()}
    for part in ("data", "engine"):
        parts[part] += end[part]
    parts["update"] = end["update"]
    seconds = length + sum(end.values())
    return StepTime(seconds, parts, parts["bubble"] / seconds)


def chunk_seconds(
    work: Work,
    plan: PipelinePlan,
    chunk: int,
    sharing: Sharing,
    weights: list[Held],
    several: bool,
) -> np.ndarray:
    """[kind, part] of a chunk's actions."""
    layers, home = plan.cut.layers[chunk], plan.cut.home[chunk]
    result = work.layers[layers.stop] - work.layers[layers.start]
    if chunk == 0:
        result = result + work.embedding
    if chunk == plan.cut.last_chunk:
        result = result + work.head
    own = weights[home].part(plan.cut.home.count(home))
    return result + sharing.micro(work, own, several)
