"""Saving, all ranks together and in the background: a copy in memory, then files, while the steps go on.

Each element has one owner: the rank whose copy counts (layers.py), and of ZeRO-0's equal copies on the data axis
each rank its share. Errors on any rank reach every rank; the older checkpoints then stand. Next: weights.py.
"""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from megalite.checkpoint.boxes import Box, boxes_of_shard
from megalite.checkpoint.files import WEIGHT, checkpoints_of, step_name
from megalite.checkpoint.folder import LATEST, Transaction, write_durably
from megalite.checkpoint.storage import BoxDict, BoxSavePlanner, BoxWriter
from megalite.parallel.grid import Axis
from megalite.parallel.layers import Shard, share


def owned_boxes(shards: Sequence[Shard], data: Axis, replicated: bool) -> BoxDict:
    """What this rank writes, as views. replicated: all ranks of the data axis hold the same shards (ZeRO-0)."""
    result: BoxDict = {}
    for shard in shards:
        if not shard.placement.counted:
            continue
        first, stop = share(shard.master.numel(), data) if replicated else (0, shard.master.numel())
        for kind, values in {WEIGHT: shard.master, **shard.state}.items():
            boxes = boxes_of_shard(
                shard.placement.full_shape,
                shard.placement.shape,
                shard.placement.offsets,
                shard.start + first,
                values[first:stop],
            )
            if boxes:
                result[f"{kind}/{shard.placement.name}"] = boxes
    return result


def copied(boxes: BoxDict) -> BoxDict:
    """The same values in memory of their own, on the CPU."""
    return {
        name: [Box(b.full_shape, b.offsets, b.values.detach().to("cpu", copy=True)) for b in some]
        for name, some in boxes.items()
    }


class Saver:
    """Saves a run's checkpoints: one at a time, in a thread. Every rank makes one and calls it at the same steps."""

    def __init__(self, run_dir: str | Path, keep: int) -> None:
        self.folder, self.keep = Path(run_dir) / "checkpoints", keep
        # Collectives of the thread must not mix with those of the steps; gloo's need no device.
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.running: Future[None] | None = None
        self.copy_bytes = 0
        self.blocked_seconds = 0.0
        """Time that steps have waited for saving, since the last look at it."""

    def save(self, step: int, boxes: BoxDict, state: dict[str, Any]) -> None:
        """Starts saving; what is given may change as soon as this returns. An earlier save still going on is
        waited for, and its error raised."""
        start = time.monotonic()
        self.wait()
        copy = copied(boxes)
        self.copy_bytes = sum(box.values.nbytes for some in copy.values() for box in some)
        self.running = self.thread.submit(self._write, step, copy, state)
        self.blocked_seconds += time.monotonic() - start

    def wait(self) -> None:
        """Waits for the save that is going on. Raises CheckpointException (on every rank) where it failed."""
        if self.running is not None:
            running, self.running = self.running, None
            running.result()

    @property
    def has_ended(self) -> bool:
        """Whether a save was started and `wait` would return at once on this rank."""
        return self.running is not None and self.running.done()

    def _write(self, step: int, boxes: BoxDict, state: dict[str, Any]) -> None:
        transaction = Transaction(self.folder / step_name(step), state)
        try:
            save(
                boxes,
                storage_writer=BoxWriter(transaction),
                planner=BoxSavePlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException:
            if self.is_first:
                transaction.abandon()
            raise
        if self.is_first:
            write_durably(self.folder / LATEST, step_name(step) + "\n")
            self._remove_old()

    def _remove_old(self) -> None:
        """Keeps the newest `keep` checkpoints; the one just written is whole, so a good one always stays."""
        for path in checkpoints_of(self.folder.parent)[: -self.keep] if self.keep else []:
            # Hidden first, so that a half removed one is never taken for whole.
            doomed = path.with_name(f".{path.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def failure_line(error: BaseException) -> str:
    """One line for the log: each rank that failed and why."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}"
