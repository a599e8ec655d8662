"""Prefetches the next step's micro-batches while a step runs, into memory that a GPU copies from asynchronously.

What is read depends only on the position in the run, so prefetched data is used only if it is for exactly the position
that is asked for. A run that rewinds or ends has prefetched a step in vain. Next: step.py.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalite.data.position import Position
from megalite.training.batches import MicroBatch, on_device, pinned

Read = Callable[[Position], list[MicroBatch]]
"""Reads this rank's micro-batches of the step that starts at a position, into main memory."""
_Key = tuple[int, int, tuple[tuple[int, int], ...]]


class Ahead:
    """The prefetcher of one run on this rank. read: always called in the same thread."""

    def __init__(self, read: Read, device: torch.device) -> None:
        self.read, self.device = read, device
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=self._begin)
        self.coming: tuple[_Key, Future[list[MicroBatch]]] | None = None

    def take(self, position: Position, following: Position | None) -> list[MicroBatch]:
        """The micro-batches of the step at `position`, on the device; then starts reading those at `following`. Raises
        the errors of reading."""
        coming = self.coming
        if coming is None or coming[0] != _key(position):
            coming = self._submit(position)
        made = coming[1].result()
        self.coming = None if following is None else self._submit(following)
        return [on_device(batch, self.device) for batch in made]

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def _submit(self, position: Position) -> tuple[_Key, "Future[list[MicroBatch]]"]:
        return _key(position), self.thread.submit(self._read, position)

    def _read(self, position: Position) -> list[MicroBatch]:
        return [pinned(batch, self.device) for batch in self.read(position)]

    def _begin(self) -> None:
        # A new thread uses GPU 0, where every rank would then take memory.
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)


def _key(position: Position) -> _Key:
    """The parts of a position on which its batches depend."""
    return position.step, position.consumed_samples, position.left_out
