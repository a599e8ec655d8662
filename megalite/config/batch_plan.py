"""The number of samples in each step: a function of the samples consumed before it, the same on every layout.

Next: rules.py, which checks the sizes against micro-batch and data axis.
"""

from dataclasses import dataclass

from megalite.config.sections import BatchRamp


@dataclass(frozen=True)
class BatchPlan:
    """The global batch size of every step: `full`, after the ramp if there is one."""

    full: int
    ramp: BatchRamp | None = None

    @property
    def levels(self) -> int:
        """Number of increments in the ramp."""
        return (self.full - self.ramp.start) // self.ramp.increment if self.ramp is not None else 0

    def size(self, consumed: int) -> int:
        """Samples of the step that begins after `consumed` samples, as with Megatron-LM's --rampup-batch-size."""
        if self.ramp is None or consumed >= self.ramp.samples:
            return self.full
        return self.ramp.start + consumed * self.levels // self.ramp.samples * self.ramp.increment

    def consumed(self, step: int) -> int:
        """Samples of the first `step` steps."""
        return self._walk(steps=step)[1]

    def steps(self, samples: int, consumed: int = 0) -> int:
        """The fewest steps, starting from `consumed` samples, after which at least `samples` are consumed."""
        return self._walk(samples=samples, consumed=consumed)[0] if samples > consumed else 0

    def _walk(
        self, steps: int | None = None, samples: int | None = None, consumed: int = 0
    ) -> tuple[int, int]:
        """(steps taken, samples consumed) of a run that starts from `consumed` samples and ends as soon as it has taken
        `steps` steps or consumed `samples` samples, whichever is given. Advances level by level, since a ramp may be
        millions of steps long."""
        done = 0
        while True:
            size = self.size(consumed)
            left = [-(-(samples - consumed) // size)] if samples is not None else []
            left += [steps - done] if steps is not None else []
            if self.ramp is not None and size < self.full:
                level = (size - self.ramp.start) // self.ramp.increment + 1
                # The number of samples at which the next level begins.
                end = -(-level * self.ramp.samples // self.levels)
                left.append(-(-(end - consumed) // size))
            count = min(left)
            done, consumed = done + count, consumed + count * size
            if (samples is not None and consumed >= samples) or done == steps:
                return done, consumed
