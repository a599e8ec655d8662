"""Predicts the seconds that a step spends on the copies of weights: sums and reductions of gradients, gathers of
weights, and the update, in which the owner of an fp32 element reads 16 bytes and writes 12. Copies of a weight are
along data and context.

As in DeepSpeed, only ZeRO-3's gathers overlap with computing. Next: step_time.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS
from megalite.plan.activations import FP32
from megalite.plan.device_figures import Device, Link
from megalite.plan.link_seconds import (
    gather_seconds,
    link_along,
    link_of,
    owners_seconds,
    ring_seconds,
    scatter_seconds,
)
from megalite.plan.work import BACKWARD, DATA, ENGINE, FORWARD, WEIGHT, Work, no_seconds

HIDDEN = 0.5  # share of a pass that hides ZeRO-3's messages, which take memory and processors from kernels
SOON = 5e8  # elements that ZeRO-3 keeps gathered between forward and backward (rank_memory.py)
COPIED_BYTES = 40  # per element: into a bucket, divided, flat to be sent, into the owned part, flat for the update
HOST_UPDATE = 4e8  # elements per second that a rank's share of a host steps with offload_optimizer


class Held(NamedTuple):
    """Elements of a rank's weights. routed: of experts that an expert axis divides; shared: of all others."""

    shared: float
    routed: float = 0.0

    def part(self, chunks: int) -> "Held":
        """The elements of one of `chunks` equal chunks."""
        return Held(self.shared / chunks, self.routed / chunks)


class Line(NamedTuple):
    """A group of `size` ranks that hold copies of `elements` elements, and its link."""

    link: Link
    size: int
    elements: float


@dataclass(frozen=True)
class Sharing:
    """How weights are shared among ranks. data, context, expert, tensor: sizes of the axes; zero: the stage; offload:
    whether the optimizer steps in main memory; moments: tensors that it keeps per weight; bucket: elements that are
    reduced at a time."""

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
        """Number of ranks that hold a copy of a weight, over which ZeRO shards."""
        return self.data * self.context

    def _lines(self, device: Device, held: Held) -> list[Line]:
        lines = [Line(link_along(device, self.ranks, self.tensor), self.ranks, held.shared)]
        if self.expert > 1:
            # The group consists of runs of neighbours along context, one in each block of the expert axis.
            run = min(self.context, max(1, device.node_ranks // self.tensor))
            apart = self.tensor * self.context * self.expert
            members = run * max(1, device.node_ranks // apart)
            size = self.ranks // self.expert
            lines.append(Line(link_of(device, size, members), size, held.routed))
        return lines

    def micro(self, work: Work, held: Held, several: bool) -> np.ndarray:
        """[kind, part]: seconds that a micro-batch adds for the weights `held`. several: whether a step has more than
        one micro-batch."""
        result, device, e = no_seconds(), work.device, work.dtype_bytes
        elements, lines = sum(held), self._lines(device, held)
        summed = 0.0
        if several or self.zero > 1:
            summed = (e + 2 * FP32) * elements / device.memory_rate
        if device.gradient_rate:
            summed += e * elements / device.gradient_rate
        if self.zero > 1:
            summed += self._copied(device, elements)
        result[BACKWARD, ENGINE] = result[WEIGHT, ENGINE] = summed + device.micro_seconds
        if self.zero == 2:
            result[BACKWARD, DATA] = result[WEIGHT, DATA] = self._reduced(lines)
        if self.zero == 3:
            forward, backward = self._gathered(work, lines[0], elements)  # there is no expert axis
            result[FORWARD, DATA], result[BACKWARD, DATA] = forward, backward
        return result

    def _gathered(self, work: Work, line: Line, elements: float) -> tuple[float, float]:
        """Seconds that ZeRO-3's messages add to a forward and to a backward. They are sent layer by layer while ranks
        compute, which hides a part of them."""
        device, layers = work.device, work.spec.num_layers
        weights = work.dtype_bytes * elements / layers
        gathered = layers * gather_seconds(line.link, line.size, weights)
        reduced = layers * scatter_seconds(line.link, line.size, FP32 * elements / layers)
        # Weights gathered for forward are kept for backward if that follows soon.
        again = max(0.0, elements - SOON) / max(1.0, elements)
        # Cores that transfer messages compute nothing meanwhile.
        hidden = (0.0 if device.cores else HIDDEN) * work.model.sum(axis=1)
        hooks = layers * device.gather_seconds
        forward = max(0.0, gathered - hidden[FORWARD]) + hooks
        backward = max(0.0, again * gathered + reduced - hidden[BACKWARD]) + hooks
        return forward, backward

    def _copied(self, device: Device, elements: float) -> float:
        """Seconds of copying gradients between buffers on their way to their owner and the update."""
        return COPIED_BYTES * elements / (device.reduce_rate or device.memory_rate)

    def _reduced(self, lines: list[Line]) -> float:
        """Seconds of the reductions of ZeRO-1 and 2."""
        return sum(
            owners_seconds(
                line.link, line.size, FP32 * line.elements, 1 + line.elements / self.bucket
            )
            for line in lines
        )

    def end(self, work: Work, held: Held, world: int = 1) -> dict[str, float]:
        """Seconds after a step's last backward, by part. world: number of all ranks, which have two tiny all-reduces:
        of the number of tokens that count and of the norm."""
        device, lines = work.device, self._lines(work.device, held)
        sent = 0.0
        for line in lines:
            if self.zero == 0:
                sent += ring_seconds(line.link, line.size, FP32 * line.elements, passes=2)
            elif self.zero < 3:
                sent += gather_seconds(line.link, line.size, work.dtype_bytes * line.elements)
        copied = 0.0
        if self.zero == 1:
            sent += self._reduced(lines)
            copied = self._copied(device, sum(held))
        sent += 2 * ring_seconds(link_along(device, world, 1), world, 0.0, passes=2)
        update = self._update(work, lines) + device.step_seconds
        return {"data": sent, "engine": copied, "update": update}

    def _update(self, work: Work, lines: list[Line]) -> float:
        """Seconds in which a rank steps the elements that it owns."""
        device, e = work.device, work.dtype_bytes
        owned = sum(line.elements / line.size if self.zero else line.elements for line in lines)
        if self.offload:
            return (FP32 + e) * owned / device.host.bytes_per_second + owned / HOST_UPDATE
        moved = FP32 * (2 + self.moments + 1 + self.moments) + e
        return moved * owned / (device.states_rate or device.memory_rate)
