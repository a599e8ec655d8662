"""The next step's micro-batches, read while a step runs, in memory that a GPU copies from without the host waiting.

What is read is a function of the position in the run and nothing else, so what was read ahead is used only where it is
of the very position that is asked for: a run that goes back or ends has read a step for nothing. Next: step.py.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megalite.data.position import Position
from megalite.training.batches import MicroBatch, on_device, pinned

Read = Callable[[Position], list[MicroBatch]]
"""This rank's micro-batches of the step that begins at a position, in main memory."""
_Key = tuple[int, int, tuple[tuple[int, int], ...]]


class Ahead:
    """Of one run on this rank. read: called in one thread, never in two at a time."""

    def __init__(self, read: Read, device: torch.device) -> None:
        self.read, self.device = read, device
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=self._begin)
        self.coming: tuple[_Key, Future[list[MicroBatch]]] | None = None

    def take(self, position: Position, following: Position | None) -> list[MicroBatch]:
        """The micro-batches of the step at `position`, on the device; those at `following` are then read. Raises what
        reading them raised."""
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
        if (
            self.device.type != "cpu"
        ):  # a thread begins with GPU 0, where every rank would then take memory
            torch.accelerator.set_device_index(self.device.index or 0)


def _key(position: Position) -> _Key:
    """All of a position that its batches depend on."""
    return position.step, position.consumed_samples, position.left_out
