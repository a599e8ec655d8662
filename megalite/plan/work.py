"""Seconds of a micro-batch in each layer, the embedding and the head, predicted from sizes, the device and its links.

    product [M, K] × [K, N]    the longer of 2·M·K·N / (FLOP/s) and its bytes / memory rate, plus a kernel launch
    core of attention          its products at `core_share` of the FLOP/s, half of them if causal
    memory-bound operations    the bytes that the layer keeps (activations.py), written and read once in forward; three
                               times as many bytes in backward, with their gradients
    tensor axis                all-reduces of hidden states, or gathers and scatters instead
    context axis               keys and values of whole samples gathered, or heads exchanged for tokens, in each layer
    expert axis                rows sent to their experts and back, spread evenly

B: samples of a micro-batch, S: tokens of a sample, D: hidden, V: vocabulary, t, c, e: ranks of the tensor, context and
expert axes. sharing.py, which is next, adds the time for copies of weights.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share
from megalite.pipeline.lengths import KINDS
from megalite.plan.activations import (
    FP32,
    Forward,
    embedding_table,
    head_table,
    layer_table,
    total,
)
from megalite.plan.device_figures import Device, Link
from megalite.plan.link_seconds import (
    gather_seconds,
    link_along,
    ring_seconds,
    scatter_seconds,
)

PARTS = (
    "products", "attention", "memory", "again", "tensor", "engine", "data", "expert", "context",
)  # fmt: skip
"""What seconds are spent on. again: recomputed forwards. tensor, data, expert, context: collectives of the axes.
engine: sums of gradients and DeepSpeed's work around them."""
PRODUCTS, ATTENTION, MEMORY, AGAIN, TENSOR, ENGINE, DATA, EXPERT, CONTEXT = range(len(PARTS))
FORWARD, BACKWARD, INPUT, WEIGHT = range(len(KINDS))  # BACKWARD is INPUT and WEIGHT together


def no_seconds() -> np.ndarray:
    """[kind, part]: zeros to be filled in."""
    return np.zeros((len(KINDS), len(PARTS)))


@dataclass(frozen=True, eq=False)
class Work:
    """A rank's work for one micro-batch. tensor, context, expert: sizes of the axes; micro: samples; length: tokens of
    a whole sample; sequence: whether there is sequence parallelism; recompute: as in Stage; counted: share of tokens
    that count in the loss; by_heads: whether the context axis exchanges heads for tokens; documents: whether attention
    keeps the documents of a sample apart; compiled: `megalite.train.compile`."""

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
        """The micro-batch in the form that activations.py takes."""
        half = torch.float16 if self.fp16 else torch.bfloat16
        axis = Axis(self.tensor, self.tensor - 1, tuple(range(self.tensor)), None)
        return Forward(
            batch=self.micro,
            length=self.length // self.context,
            dtype=half if self.dtype_bytes == 2 else torch.float32,
            split=Split(axis, self.sequence),
            documents=self.documents,
            device="cpu" if self.device.cores else "cuda",
            context=self.context,
            by_heads=self.by_heads,
            experts=self.expert,
            compiled=self.compiled,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens on the rank."""
        return self.micro * self.length // self.context

    @property
    def hidden_bytes(self) -> int:
        """Bytes of hidden states between the split products, which are a message of the pipe axis."""
        return self.at.hidden(self.spec)

    def product(self, k: int, n: int, times: int = 1, matrices: int = 1) -> float:
        """Seconds of [tokens · times, k] × [k, n]. times: rows per token; matrices: that the rows are divided among."""
        m, device = self.tokens * times, self.device
        moved = self.dtype_bytes * (m * k + matrices * k * n + m * n)
        seconds = max(2.0 * m * k * n / device.flops(self.dtype_bytes), moved / device.memory_rate)
        return seconds + device.launch_seconds

    def part(self, features: int, unit: int = 1) -> int:
        """Number of this rank's `features`, which the tensor axis splits in multiples of `unit`."""
        start, stop = share(features, self.at.split.axis, unit)
        return stop - start

    @cached_property
    def _link(self) -> Link:
        return link_along(self.device, self.tensor, 1)

    def exchange(self) -> float:
        """Seconds of an all-reduce of hidden states, or of the gather and scatter that replace it."""
        whole = self.dtype_bytes * self.tokens * self.spec.hidden_size
        if not self.sequence:
            return ring_seconds(self._link, self.tensor, whole, passes=2)
        gathered = gather_seconds(self._link, self.tensor, whole)
        return gathered + scatter_seconds(self._link, self.tensor, whole)

    @cached_property
    def _queries(self) -> int:
        """Features of this rank's queries."""
        return self.part(self.spec.num_heads * self.spec.head_size, self.spec.head_size)

    @cached_property
    def _keys(self) -> int:
        """Features of this rank's keys."""
        return self.part(self.spec.num_kv_heads * self.spec.head_size, self.spec.head_size)

    @cached_property
    def _context_bytes(self) -> list[float]:
        """Bytes that each collective of a layer's forward on the context axis gathers or exchanges; those of backward
        are as large (docs/layouts.md, "Long samples")."""
        e = self.dtype_bytes
        if not self.by_heads:
            return [e * 2.0 * self.micro * self.length * self._keys]
        keys = max(self._keys, self.context * self.spec.head_size)  # at least one head per rank
        there = e * self.tokens * (self._queries + 2.0 * keys)
        back = e * self.tokens * float(self._queries)
        return [there, back]

    @cached_property
    def context_seconds(self) -> float:
        """Seconds of a layer's collectives on the context axis, in forward or backward."""
        link = link_along(self.device, self.context, self.tensor)
        seconds = ring_seconds if self.by_heads else gather_seconds
        return sum(seconds(link, self.context, whole) for whole in self._context_bytes)

    @property
    def mixed_bytes(self) -> float:
        """Bytes that a rank sends in these collectives."""
        return sum(self._context_bytes) * (self.context - 1) / self.context

    def layer(self, layer: int) -> np.ndarray:
        """[kind, part]: seconds of one layer."""
        spec, device = self.spec, self.device
        products = self._projections() + self._mlp(layer)
        core = self._core(spec.window(layer))
        kept = total(layer_table(spec, layer, self.at))
        core_bytes = kept - total(layer_table(spec, layer, self.at, selective=True))
        result = no_seconds()
        forward, to_input, to_weight = result[FORWARD], result[INPUT], result[WEIGHT]
        forward[PRODUCTS] = to_input[PRODUCTS] = to_weight[PRODUCTS] = products
        forward[ATTENTION] = core
        to_input[ATTENTION] = 2.0 * core
        forward[MEMORY] = 2 * kept / device.memory_rate
        to_input[MEMORY] = 3 * kept / device.memory_rate
        forward[TENSOR] = to_input[TENSOR] = 2 * self.exchange()
        forward[CONTEXT] = to_input[CONTEXT] = self.context_seconds
        forward[EXPERT] = to_input[EXPERT] = self._to_experts(layer)
        forward[ENGINE] = to_input[ENGINE] = to_weight[ENGINE] = device.layer_seconds
        if self.recompute == "full":
            to_input[AGAIN] = forward.sum()
        elif self.recompute == "selective":
            to_input[AGAIN] = core + 2 * core_bytes / device.memory_rate + self.context_seconds
        result[BACKWARD] = to_input + to_weight
        return result

    def _projections(self) -> float:
        """Seconds of the products of attention's four projections in forward."""
        d, q, k = self.spec.hidden_size, self._queries, self._keys
        return sum(self.product(a, b) for a, b in ((d, q), (d, k), (d, k), (q, d)))

    def _mlp(self, layer: int) -> float:
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

    def _core(self, window: int | None) -> float:
        """Seconds of attention's two products in forward, for a rank's tokens with all heads; as many as for all tokens
        with the rank's heads (by_heads)."""
        spec, s = self.spec, self.length
        flops = self.device.flops(self.dtype_bytes)
        if spec.attention_dropout > 0:  # explicit products, which compute all scores
            return 4.0 * self.tokens * s * self._queries / flops
        seen = min(window or s, s)
        average = seen - seen**2 / (2 * s) if spec.causal else seen
        rate = flops * self.device.core_share
        return 4.0 * self.tokens * average * self._queries / rate + self.device.launch_seconds

    def _to_experts(self, layer: int) -> float:
        """Seconds in which rows are sent to their experts and back."""
        mixture = self.spec.mixture_of(layer)
        if mixture is None:
            return 0.0
        link = link_along(self.device, self.expert, self.context * self.tensor)
        rows = self.tokens * mixture.chosen
        whole = self.dtype_bytes * rows * self.spec.hidden_size
        return 2 * ring_seconds(link, self.expert, whole)

    @cached_property
    def embedding(self) -> np.ndarray:
        """[kind, part]: seconds of the look-up and its gradient."""
        result, rate = no_seconds(), self.device.memory_rate
        hidden = self.dtype_bytes * self.tokens * self.spec.hidden_size
        table = self.dtype_bytes * self.part(self.spec.vocabulary_size) * self.spec.hidden_size
        kept = 2 * hidden + total(embedding_table(self.spec, self.at))
        result[FORWARD, MEMORY] = kept / rate
        result[FORWARD, TENSOR] = self.exchange()
        result[WEIGHT, MEMORY] = (table + 2 * hidden) / rate
        result[BACKWARD] = result[INPUT] + result[WEIGHT]
        return result

    @cached_property
    def head(self) -> np.ndarray:
        """[kind, part]: seconds of norm, product and loss; forward also computes the gradients of product and loss."""
        spec, result, rate = self.spec, no_seconds(), self.device.memory_rate
        columns = len(spec.labels) or self.part(spec.vocabulary_size)
        logits = self.tokens * columns * (self.dtype_bytes + FP32) * 3
        kept = total(head_table(spec, self.at))
        result[FORWARD, PRODUCTS] = 3 * self.counted * self.product(spec.hidden_size, columns)
        result[FORWARD, MEMORY] = (self.counted * logits + 2 * kept) / rate
        result[FORWARD, TENSOR] = self.exchange()
        result[INPUT, MEMORY] = 3 * self.hidden_bytes / rate
        if spec.head_transform and spec.classifier is None:
            for kind in (FORWARD, INPUT, WEIGHT):
                result[kind, PRODUCTS] += self.product(spec.hidden_size, spec.hidden_size)
        result[BACKWARD] = result[INPUT] + result[WEIGHT]
        return result

    @cached_property
    def layers(self) -> np.ndarray:
        """[layer + 1, kind, part]: seconds of all layers before each."""
        kinds = [self.spec.kind(layer) for layer in range(self.spec.num_layers)]
        by_kind = {kind: self.layer(kinds.index(kind)) for kind in set(kinds)}
        own = [by_kind[kind] for kind in kinds]
        return np.concatenate([np.zeros((1, *own[0].shape)), np.cumsum(own, axis=0)])

    @cached_property
    def model(self) -> np.ndarray:
        """[kind, part]: seconds of the whole model."""
        return self.layers[-1] + self.embedding + self.head
