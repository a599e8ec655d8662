"""What gradients of weights take in a step, by ZeRO's stage: how they come with each backward, and what reducing them
and the update need beside them. As DeepSpeed 0.19.8 does it (runtime/zero/stage_1_and_2.py, stage3.py), n numbers a
rank, p of them in a rank's partition, of e bytes each:

    ZeRO-0, 1      the first backward of a chunk leaves its gradients, 4·n with sums in fp32; a later one makes each
                   again, e bytes a number, and adds it
    ZeRO-0         at the end a flat copy of the gradients is all-reduced
    ZeRO-1         the bucket comes with the first gradient of a step. At the end gradients move into it, one after
                   another; each time that it is full a flat copy of a rank's part is sent, and what the rank owns is
                   copied to where the update reads it
    ZeRO-2         the same in each backward: no gradient stays but those that the rank owns, in fp32 of a micro-batch
                   and of the sum of those before, in 16 bits of the sum alone. The bucket goes with the backward
    ZeRO-3         the same; bucket and sums stand from the start, a reduce-scatter has a copy of what it sends

The optimizer's step lays the owned gradients of a parameter group out flat, once more where they do not lie so.
Next: timeline.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalite.plan.backward import Op

FP32 = 4
ALL_REDUCED = 5 * 10**8  # numbers that DeepSpeed all-reduces at a time with ZeRO-0


@dataclass(frozen=True)
class Reduction:
    """What of a resolved config the gradients of a rank depend on. zero: the stage; width: bytes of a number;
    numbers: of all its weights; parts: of its partition in each of the optimizer's groups; sums: bytes of the gradients
    that the rank owns between the backwards of a step and after its last, with ZeRO-1 and 2; bucket: numbers of a
    bucket; buffers: that there are of it; copies: ranks that hold a weight; clones: whether sending copies what it
    sends (gloo)."""

    zero: int
    width: int
    numbers: int
    parts: tuple[int, ...]
    sums: int
    bucket: int
    buffers: int
    copies: int
    clones: bool

    @property
    def is_half(self) -> bool:
        return self.width < FP32

    @property
    def bucket_bytes(self) -> int:
        """Of all its buffers."""
        width = FP32 if self.zero in (1, 3) else self.width
        return width * self.bucket * self.buffers

    def sent(self, numbers: int) -> int:
        """Bytes beside a bucket with so many numbers while they are sent."""
        if self.zero == 3:
            return FP32 * numbers * (1 + self.is_half + self.clones)
        if self.copies == 1 and not self.is_half:
            return 0  # what goes to one rank alone is sent as it lies
        part = min(numbers, sum(self.parts))
        return part * (self.width + FP32 * self.is_half)


@dataclass
class Moment:
    """Bytes at a time. kept: of activations, and what a backward makes; gradients; buckets: with what is sent."""

    kept: int = 0
    gradients: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.gradients + self.buckets


@dataclass
class Gradients:
    """Of a rank, while a step is walked through. now: what there is; most: the moment at which there was most."""

    rules: Reduction
    now: Moment = field(default_factory=Moment)
    most: Moment = field(default_factory=Moment)
    begun: set[int] = field(default_factory=set)
    """Chunks that have gradients."""
    filled: int = 0
    """Numbers in the bucket."""
    has_copy: bool = False
    """Whether this backward has a copy of what the rank owns."""

    @classmethod
    def begin(cls, rules: Reduction) -> "Gradients":
        """Before a step's first action."""
        stands = rules.bucket_bytes if rules.zero == 3 else 0
        return cls(rules, Moment(buckets=stands), Moment(buckets=stands))

    def look(self, more: int = 0, sent: int = 0) -> None:
        """Notes the moment if there was never as much. more: bytes of `kept` that are there for a moment."""
        if self.now.total + more + sent > self.most.total:
            now = self.now
            self.most = Moment(now.kept + more, now.gradients, now.buckets + sent)

    def backward(self, chunk: int, ops: Sequence[Op], closes: bool = True) -> None:
        """Of a micro-batch through a chunk. closes: whether gradients of all of it are there afterwards."""
        for op in ops:
            made = op.made + self.rules.width * sum(op.weights)
            self.look(made)
            self.now.kept += made - op.freed
            for numbers in op.weights:
                self._take(chunk, numbers)
        self.look()
        if closes:
            self.begun.add(chunk)
            self._end_of_backward()

    def _take(self, chunk: int, numbers: int) -> None:
        """A gradient that was made, and is counted in `kept` so far."""
        rules, now = self.rules, self.now
        if rules.zero in (1, 2) and now.buckets == 0:
            now.buckets = rules.bucket_bytes
            self.look()
        if rules.zero < 2:
            if chunk not in self.begun:
                now.gradients += FP32 * numbers
                self.look(0 if rules.is_half else -rules.width * numbers)
        else:
            self._into_bucket(numbers)
        now.kept -= rules.width * numbers

    def _into_bucket(self, numbers: int) -> None:
        if self.filled + numbers > self.rules.bucket:
            self._reduce()
        self.filled += numbers

    def _reduce(self) -> None:
        """Sends what is in the bucket."""
        rules = self.rules
        self.look(sent=rules.sent(self.filled))
        self.filled = 0
        if rules.zero == 2 and not self.has_copy:
            self.has_copy = True
            if not rules.is_half or self.now.gradients == 0:
                self.now.gradients += rules.sums
                self.look()

    def _end_of_backward(self) -> None:
        rules = self.rules
        if rules.zero < 2:
            return
        self._reduce()
        if rules.zero == 2:
            self.now.gradients, self.now.buckets, self.has_copy = rules.sums, 0, False

    def end(self) -> None:
        """Reduction and update after a step's last backward."""
        rules = self.rules
        if rules.zero == 0 and rules.copies > 1:
            self.look(sent=FP32 * min(rules.numbers, ALL_REDUCED))
        if rules.zero == 1:
            self._reduce_all()
        if rules.zero == 3 or (rules.zero > 0 and not rules.is_half):
            self.look(FP32 * max(rules.parts))  # flat, of one of the optimizer's groups at a time

    def _reduce_all(self) -> None:
        """With ZeRO-1: gradients move into the bucket, and what the rank owns out of it."""
        rules, now = self.rules, self.now
        first = min(rules.bucket, rules.numbers)
        now.gradients -= FP32 * first
        self.look(sent=rules.sent(first))
        now.gradients += rules.sums
        self.look()
        now.gradients, now.buckets = rules.sums, 0
