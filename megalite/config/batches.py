"""How many samples each step takes: a function of the samples consumed before it, the same on every layout.

Next: rules.py, which compares the sizes with micro-batch and data axis.
"""

from dataclasses import dataclass

from megalite.config.sections import BatchRamp


@dataclass(frozen=True)
class BatchPlan:
    """The global batch of every step: `full`, after a ramp where there is one."""

    full: int
    ramp: BatchRamp | None = None

    @property
    def levels(self) -> int:
        """Rises of the ramp."""
        return (self.full - self.ramp.start) // self.ramp.increment if self.ramp is not None else 0

    def size(self, consumed: int) -> int:
        """Samples of the step that begins after `consumed` samples, as Megatron-LM's --rampup-batch-size has it."""
        if self.ramp is None or consumed >= self.ramp.samples:
            return self.full
        return self.ramp.start + consumed * self.levels // self.ramp.samples * self.ramp.increment

    def consumed(self, step: int) -> int:
        """Samples of the first `step` steps."""
        return self._walk(steps=step)[1]

    def steps(self, samples: int, consumed: int = 0) -> int:
        """The fewest steps after `consumed` samples that bring them to so many or more."""
        return self._walk(samples=samples, consumed=consumed)[0] if samples > consumed else 0

    def _walk(
        self, steps: int | None = None, samples: int | None = None, consumed: int = 0
    ) -> tuple[int, int]:
        """(steps, samples) of a run from where it has consumed so many, to the first place that has as many of the one
        given; level by level, since a ramp may be millions of steps long."""
        done = 0
        while True:
            size = self.size(consumed)
            left = [-(-(samples - consumed) // size)] if samples is not None else []
            left += [steps - done] if steps is not None else []
            if self.ramp is not None and size < self.full:
                level = (size - self.ramp.start) // self.ramp.increment + 1
                # The first count of samples of the next level.
                end = -(-level * self.ramp.samples // self.levels)
                left.append(-(-(end - consumed) // size))
            count = min(left)
            done, consumed = done + count, consumed + count * size
            if (samples is not None and consumed >= samples) or done == steps:
                return done, consumed
