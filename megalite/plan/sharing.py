"""Seconds that the copies of weights add to a step, predicted: sums of gradients, their reduction, weights that are
gathered, and the update, which reads 16 bytes a number and writes 12, in fp32, on the rank that owns it. Copies of a
weight are along data and context.

Nothing overlaps but ZeRO-3's gathers with computing, as in DeepSpeed. Next: step_time.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS
from megalite.plan.activations import FP32
from megalite.plan.devices import Device, Link
from megalite.plan.link_seconds import (
    gather_seconds,
    link_along,
    link_of,
    owners_seconds,
    ring_seconds,
    scatter_seconds,
)
from megalite.plan.work import BACKWARD, DATA, ENGINE, FORWARD, WEIGHT, Work, no_seconds

HIDDEN = 0.5  # of the time of a pass, that hides ZeRO-3's messages, which take memory and processors from kernels
SOON = 5e8  # of ZeRO-3's weights, that stay between forward and backward (rank_memory.py)
COPIED_BYTES = 40  # read and written: into a bucket, divided, flat for sending, to what is owned, flat for the update
HOST_UPDATE = 4e8  # numbers a second that a rank's share of a host steps with offload_optimizer


class Held(NamedTuple):
    """Numbers of a rank's weights. routed: of experts that an expert axis divides; shared: all others."""

    shared: float
    routed: float = 0.0

    def part(self, chunks: int) -> "Held":
        """Those of one of so many chunks that are alike."""
        return Held(self.shared / chunks, self.routed / chunks)


class Line(NamedTuple):
    """A group of `size` ranks that hold copies of so many numbers, and its link."""

    link: Link
    size: int
    numbers: float


@dataclass(frozen=True)
class Sharing:
    """How weights are shared out. data, context, expert, tensor: ranks of the axes; zero: the stage; offload: whether
    the optimizer is stepped in main memory; moments: tensors that it keeps of each weight; bucket: numbers that are
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
        """Ranks that hold a copy of a weight, over which ZeRO shards."""
        return self.data * self.context

    def _lines(self, device: Device, held: Held) -> list[Line]:
        lines = [Line(link_along(device, self.ranks, self.tensor), self.ranks, held.shared)]
        if self.expert > 1:
            # Runs of neighbours along context, one for every run of the expert axis.
            run = min(self.context, max(1, device.node_ranks // self.tensor))
            apart = self.tensor * self.context * self.expert
            members = run * max(1, device.node_ranks // apart)
            size = self.ranks // self.expert
            lines.append(Line(link_of(device, size, members), size, held.routed))
        return lines

    def micro(self, work: Work, held: Held, several: bool) -> np.ndarray:
        """[kind, part] that a micro-batch adds for so many numbers of weights; several: whether a step has more than
        one micro-batch."""
        result, device, e = no_seconds(), work.device, work.dtype_bytes
        numbers, lines = sum(held), self._lines(device, held)
        summed = 0.0
        if several or self.zero > 1:
            summed = (e + 2 * FP32) * numbers / device.memory_rate
        if device.gradient_rate:
            summed += e * numbers / device.gradient_rate
        if self.zero > 1:
            summed += self._copied(device, numbers)
        result[BACKWARD, ENGINE] = result[WEIGHT, ENGINE] = summed + device.micro_seconds
        if self.zero == 2:
            result[BACKWARD, DATA] = result[WEIGHT, DATA] = self._reduced(lines)
        if self.zero == 3:
            forward, backward = self._gathered(work, lines[0], numbers)  # there is no expert axis
            result[FORWARD, DATA], result[BACKWARD, DATA] = forward, backward
        return result

    def _gathered(self, work: Work, line: Line, numbers: float) -> tuple[float, float]:
        """Seconds that ZeRO-3's messages add to a forward and to a backward. They go layer by layer, beside computing,
        which hides a part of them."""
        device, layers = work.device, work.spec.num_layers
        weights = work.dtype_bytes * numbers / layers
        gathered = layers * gather_seconds(line.link, line.size, weights)
        reduced = layers * scatter_seconds(line.link, line.size, FP32 * numbers / layers)
        # What is gathered for forward stays for backward, where that comes soon.
        again = max(0.0, numbers - SOON) / max(1.0, numbers)
        # Cores that pass messages on compute nothing meanwhile.
        hidden = (0.0 if device.cores else HIDDEN) * work.model.sum(axis=1)
        hooks = layers * device.gather_seconds
        forward = max(0.0, gathered - hidden[FORWARD]) + hooks
        backward = max(0.0, again * gathered + reduced - hidden[BACKWARD]) + hooks
        return forward, backward

    def _copied(self, device: Device, numbers: float) -> float:
        """Seconds in which gradients are copied from one buffer to another on their way to their owner and the
        update."""
        return COPIED_BYTES * numbers / (device.reduce_rate or device.memory_rate)

    def _reduced(self, lines: list[Line]) -> float:
        """Seconds in which ZeRO-1 and 2 reduce."""
        return sum(
            owners_seconds(
                line.link, line.size, FP32 * line.numbers, 1 + line.numbers / self.bucket
            )
            for line in lines
        )

    def end(self, work: Work, held: Held, world: int = 1) -> dict[str, float]:
        """Seconds after a step's last backward, by part. world: ranks in all, which sum a few numbers twice: the tokens
        that count, and the norm."""
        device, lines = work.device, self._lines(work.device, held)
        sent = 0.0
        for line in lines:
            if self.zero == 0:
                sent += ring_seconds(line.link, line.size, FP32 * line.numbers, passes=2)
            elif self.zero < 3:
                sent += gather_seconds(line.link, line.size, work.dtype_bytes * line.numbers)
        copied = 0.0
        if self.zero == 1:
            sent += self._reduced(lines)
            copied = self._copied(device, sum(held))
        sent += 2 * ring_seconds(link_along(device, world, 1), world, 0.0, passes=2)
        update = self._update(work, lines) + device.step_seconds
        return {"data": sent, "engine": copied, "update": update}

    def _update(self, work: Work, lines: list[Line]) -> float:
        """Seconds in which a rank steps the numbers that it owns."""
        device, e = work.device, work.dtype_bytes
        owned = sum(line.numbers / line.size if self.zero else line.numbers for line in lines)
        if self.offload:
            return (FP32 + e) * owned / device.host.bytes_per_second + owned / HOST_UPDATE
        moved = FP32 * (2 + self.moments + 1 + self.moments) + e
        return moved * owned / (device.states_rate or device.memory_rate)
