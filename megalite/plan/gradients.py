"""Memory of weight gradients in a step, by ZeRO stage: during backwards, reduction and update. As in DeepSpeed 0.19.8
(runtime/zero/stage_1_and_2.py, stage3.py), with n weights per rank, p of them in its partition, of e bytes each:

    ZeRO-0, 1      the first backward of a chunk leaves its gradients, 4·n with sums in fp32; a later one computes each
                   again, e bytes per element, and adds it
    ZeRO-0         at the end a flat copy of the gradients is all-reduced
    ZeRO-1         the bucket is allocated with the first gradient of a step. At the end gradients move into it one by
                   one; when it is full, a flat copy of a rank's part is sent, and the part that the rank owns is copied
                   to where the update reads it
    ZeRO-2         the same in each backward: only the gradients that the rank owns stay, in fp32 those of the
                   micro-batch (copied when their bucket is sent) and of the sum so far, in 16 bits only the sum. The
                   backward's end frees the bucket
    ZeRO-3         the same, but bucket and sums always exist, and a reduce-scatter copies what it sends

The optimizer's step copies the owned gradients of a parameter group into a flat buffer if they are not contiguous.
Next: memory_timeline.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalite.plan.backward import Op

FP32 = 4
ALL_REDUCED = 5 * 10**8  # elements that DeepSpeed all-reduces at a time with ZeRO-0


@dataclass(frozen=True)
class Reduction:
    """What the gradients of a rank depend on. zero: the stage. width: bytes per element. numbers: elements of all its
    weights. parts: elements of its partition in each of the optimizer's groups. sums: bytes of the gradients that the
    rank owns between the backwards of a step and after the last, with ZeRO-1 and 2. bucket: elements of a bucket.
    buffers: number of buckets. copies: ranks that hold a weight. clones: whether sending copies the data (gloo)."""

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
        """Bytes of all buckets."""
        width = FP32 if self.zero in (1, 3) else self.width
        return width * self.bucket * self.buffers

    def sent(self, numbers: int) -> int:
        """Bytes needed besides the bucket while `numbers` elements of it are sent."""
        if self.zero == 3:
            return FP32 * numbers * (1 + self.is_half + self.clones)
        if self.copies == 1 and not self.is_half:
            return 0  # a single receiver is sent the bucket itself
        part = min(numbers, sum(self.parts))
        return part * (self.width + FP32 * self.is_half)


@dataclass
class Moment:
    """Bytes at one moment. kept: activations and intermediate results of a backward. buckets: including what is
    sent."""

    kept: int = 0
    gradients: int = 0
    buckets: int = 0

    @property
    def total(self) -> int:
        return self.kept + self.gradients + self.buckets


@dataclass
class GradientMemory:
    """A rank's gradients while a step is simulated. now: the current bytes. most: the moment with the most."""

    rules: Reduction
    now: Moment = field(default_factory=Moment)
    most: Moment = field(default_factory=Moment)
    begun: set[int] = field(default_factory=set)
    """Chunks that have gradients."""
    filled: int = 0
    """Elements in the bucket."""

    @classmethod
    def begin(cls, rules: Reduction) -> "GradientMemory":
        """The state before a step's first action."""
        permanent = rules.bucket_bytes if rules.zero == 3 else 0
        return cls(rules, Moment(buckets=permanent), Moment(buckets=permanent))

    def look(self, more: int = 0, sent: int = 0) -> None:
        """Records the moment if it is a new maximum. more: temporary bytes of `kept`. sent: temporary bytes of
        `buckets`."""
        if self.now.total + more + sent > self.most.total:
            now = self.now
            self.most = Moment(now.kept + more, now.gradients, now.buckets + sent)

    def backward(self, chunk: int, ops: Sequence[Op], closes: bool = True) -> None:
        """The backward of a micro-batch through a chunk. closes: whether it completes the chunk's gradients."""
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
        """Accounts for a new gradient, which is counted in `kept` so far."""
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
        """Sends the bucket."""
        rules = self.rules
        self.look(sent=rules.sent(self.filled))
        if rules.zero == 2 and not rules.is_half:  # a copy of each gradient that the rank owns
            self.now.gradients += rules.sums * self.filled // rules.numbers
            self.look()
        elif rules.zero == 2 and self.now.gradients == 0:
            self.now.gradients = rules.sums
            self.look()
        self.filled = 0

    def _end_of_backward(self) -> None:
        rules = self.rules
        if rules.zero < 2:
            return
        self._reduce()
        if rules.zero == 2:
            self.now.gradients, self.now.buckets = rules.sums, 0

    def end(self) -> None:
        """Reduction and update after a step's last backward."""
        rules = self.rules
        if rules.zero == 0 and rules.copies > 1:
            self.look(sent=FP32 * min(rules.numbers, ALL_REDUCED))
        if rules.zero == 1:
            self._reduce_all()
        if rules.zero == 3 or (rules.zero > 0 and not rules.is_half):
            self.look(FP32 * max(rules.parts))  # flat, one of the optimizer's groups at a time

    def _reduce_all(self) -> None:
        """ZeRO-1's reduction: gradients move into the bucket, and those that the rank owns are copied out of it."""
        rules, now = self.rules, self.now
        first = min(rules.bucket, rules.numbers)
        now.gradients -= FP32 * first
        self.look(sent=rules.sent(first))
        now.gradients += rules.sums
        self.look()
        now.gradients, now.buckets = rules.sums, 0
