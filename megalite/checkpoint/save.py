"""Saves checkpoints on all ranks in the background: copies the state in memory, then writes files while training
continues. On a GPU the copy itself overlaps with the next step's forward and backward; only its update waits for it.

If a rank has no memory for its copy, training waits instead while files are written from the live tensors. Each element
has one owner: the rank whose copy counts (parallel/layers.py); of ZeRO-0's equal copies, each rank owns a share.
An error on any rank is raised on every rank, and the older checkpoints remain. Next: weights.py.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.files import (
    WEIGHT,
    checkpoints_of,
    named_best,
    step_name,
    step_of,
)
from megalite.checkpoint.folder import BEST, LATEST, LEFT_OVER_NAME, Transaction, write_durably
from megalite.checkpoint.parts import BoxDict
from megalite.checkpoint.storage import SaveFailed, write_together
from megalite.config.limits import DEFAULT_TIMEOUT
from megalite.config.rules import machine_has_gpu
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import Shard


def owned_boxes(shards: Sequence[Shard], grid: Grid, replicated: bool) -> BoxDict:
    """The boxes that this rank writes, as views. replicated: whether all ranks with copies of a slice hold the same
    shards (ZeRO-0)."""
    result: BoxDict = {}
    for shard in shards:
        if not shard.placement.counted:
            continue
        count = shard.master.numel()
        replicas: Axis = getattr(grid, shard.placement.replicas)
        first, stop = _part(count, replicas) if replicated else (0, count)
        placement = shard.placement
        for kind, values in {WEIGHT: shard.master, **shard.state}.items() if first < stop else ():
            held, start = values[first:stop], shard.start + first
            box = Box(placement.full_shape, placement.offsets, held, placement.shape, start)
            result[f"{kind}/{placement.name}"] = [box]
    return result


def _part(count: int, axis: Axis) -> tuple[int, int]:
    """The half-open range of `count` elements that this rank of the axis writes. It is empty on some ranks if there are
    more ranks than elements (layers.share would give them an element that another rank writes too)."""
    return axis.rank * count // axis.size, (axis.rank + 1) * count // axis.size


def stream_beside(device: torch.device) -> Any:
    """A separate stream of a device, for work that its steps need not wait for; None for a CPU."""
    return None if device.type == "cpu" else torch.Stream(device)


def own_device() -> int | None:
    """Index of this process's device; None if it computes on the CPU, perhaps beside GPUs."""
    return torch.accelerator.current_device_index() if machine_has_gpu() else None


def use_device(index: int | None) -> None:
    """Sets the current device. Call it in each new thread: threads start with device 0, where every rank would then
    allocate memory."""
    if index is not None:
        torch.accelerator.set_device_index(index)


def taken_bytes(size: int, pinned: bool) -> int:
    """Host memory that a tensor of `size` bytes takes. torch allocates pinned memory in powers of two
    (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if pinned else size


class Copy:
    """Host memory that boxes are copied to. It is reused by later saves, because allocating it takes several times as
    long as filling it.

    From a GPU the copies run in a separate stream, after the work that is already queued; the host does not wait.
    `made` is an event after the last copy, None on a CPU. Until it has completed, the boxes must not change
    (Engine.update_waits_for), and the memory must not be read.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        """limit_bytes: most memory for the copy; None: half of the node's free memory, divided among its ranks."""
        self.limit_bytes = limit_bytes
        self.memory: dict[torch.dtype, Tensor] = {}
        self.pinned = False
        self.made: Any = None
        self._streams: dict[torch.device, Any] = {}

    def take(self, boxes: BoxDict) -> BoxDict | None:
        """Copies the boxes; returns None if the copy would exceed the limit or the available memory."""
        self.made = None
        counts: Counter[torch.dtype] = Counter()
        for box in (box for some in boxes.values() for box in some):
            counts[box.values.dtype] += box.values.numel()
        device = _device_of(boxes)
        self.pinned = device.type != "cpu"  # only there does a device write by itself
        wanted = sum(
            taken_bytes(dtype.itemsize * count, self.pinned) for dtype, count in counts.items()
        )
        free = (
            psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            + self.held_bytes
        )
        fits = wanted <= (free if self.limit_bytes is None else self.limit_bytes)
        self.release(keep=counts if fits else {})
        if not fits:
            return None
        for dtype, count in counts.items():
            if dtype not in self.memory:
                try:
                    # Pinned memory, since other copies from a device are not asynchronous.
                    self.memory[dtype] = torch.empty(count, dtype=dtype, pin_memory=self.pinned)
                except RuntimeError:  # out of memory
                    return None
        if device not in self._streams:
            self._streams[device] = stream_beside(device)
        stream = self._streams[device]
        if stream is not None:  # wait for the update of this step
            stream.wait_stream(torch.accelerator.current_stream())
        with nullcontext() if stream is None else stream:
            result = self._filled(boxes)
        self.made = None if stream is None else stream.record_event()
        return result

    def release(self, keep: Mapping[torch.dtype, int] | None = None) -> None:
        """Frees the copy's memory, except tensors whose dtype and number of elements are in `keep`. No box may use
        freed memory."""
        kept = {
            dtype: memory
            for dtype, memory in self.memory.items()
            if memory.numel() == (keep or {}).get(dtype)
        }
        released, self.memory = len(kept) < len(self.memory), kept
        if released and self.pinned:
            # torch caches freed pinned memory, and cannot release blocks that a stream still writes to.
            for stream in self._streams.values():
                stream.synchronize()
            torch.accelerator.empty_host_cache()

    def _filled(self, boxes: BoxDict) -> BoxDict:
        used: Counter[torch.dtype] = Counter()
        result: BoxDict = {}
        for name, some in boxes.items():
            result[name] = []
            for box in some:
                dtype, count = box.values.dtype, box.values.numel()
                copy = self.memory[dtype].narrow(0, used[dtype], count).view(box.values.shape)
                copy.copy_(box.values.detach(), non_blocking=True)
                result[name].append(replace(box, values=copy))
                used[dtype] += count
        return result

    @property
    def held_bytes(self) -> int:
        """Bytes of this process's memory that the copy takes."""
        return sum(taken_bytes(memory.nbytes, self.pinned) for memory in self.memory.values())


def _device_of(boxes: BoxDict) -> torch.device:
    """The device that boxes are copied from: the GPU if some boxes are on it and others on the CPU, as with offload."""
    found = {box.values.device for some in boxes.values() for box in some}
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))


class Saver:
    """Saves a run's checkpoints, one at a time, in a thread. Collective: every rank must create a Saver and call it at
    the same steps."""

    def __init__(
        self,
        run_dir: str | Path,
        keep: int,
        copy_limit_bytes: int | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        """keep: number of newest checkpoints to keep, 0: all; copy_limit_bytes: as in Copy; timeout: for each
        collective."""
        self.folder, self.keep = Path(run_dir) / "checkpoints", keep
        self.good_step: int | None = None  # of the newest checkpoint that is known to be undamaged
        self.damaged, self.strange = set[str](), set[str]()
        self.carried: dict[str, bytes] = {}
        """On rank 0: small files that are added to every checkpoint, by name."""
        # The thread's collectives must not interleave with those of training; with gloo they need no device.
        self.group: Any = (
            dist.new_group(timeout=timeout, backend="gloo") if dist.is_initialized() else None
        )
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint", initializer=use_device, initargs=(own_device(),)
        )
        self.running: Future[float] | None = None
        self.copy = Copy(copy_limit_bytes)
        self.figures: dict[str, float] = {}
        """Figures since the last `taken_figures`: checkpoint_seconds, the time that steps waited; for finished saves,
        checkpoint_write_seconds and checkpoint_copy_bytes, this rank's memory for the copy (0: the steps waited)."""
        self.lines: list[str] = []
        """On rank 0: log lines about checkpoints that were removed early or renamed, or could not be."""

    def starts_from(self, step: int, damaged: Collection[str]) -> None:
        """Records that the run starts from the checkpoint of that step. damaged: names of the checkpoints that it found
        damaged."""
        self.good_step, self.damaged = step, {*damaged}

    def save(self, step: int, boxes: BoxDict, state: dict[str, Any], is_best: bool = False) -> None:
        """Starts a save. The boxes may change as soon as this returns; on a GPU, as soon as `copy.made` has completed.
        First waits for an earlier save that is still in progress, and raises its error. If a rank has no memory for its
        copy, all ranks also wait for this save. is_best: whether to update `best`."""
        self.wait()
        start = time.monotonic()
        copy = self.copy.take(boxes)
        in_background = self._everywhere(copy is not None)
        self.running = self.thread.submit(
            self._write,
            step,
            copy if copy and in_background else boxes,
            state,
            is_best,
            self.copy.made,
        )
        if not in_background:
            del copy
            self.copy.release()
            futures.wait([self.running])
        self._count("checkpoint_seconds", time.monotonic() - start)

    def wait(self) -> None:
        """Waits for the save in progress. Raises SaveFailed (on every rank) if it failed."""
        if self.running is not None:
            start = time.monotonic()
            running, self.running = self.running, None
            try:
                self._count("checkpoint_write_seconds", running.result())
                self.figures["checkpoint_copy_bytes"] = self.copy.held_bytes
            finally:
                self._count("checkpoint_seconds", time.monotonic() - start)

    @property
    def has_ended(self) -> bool:
        """Whether a save was started and `wait` would return at once on this rank."""
        return self.running is not None and self.running.done()

    def taken_figures(self) -> dict[str, float]:
        """Returns `figures` and resets them."""
        taken, self.figures = self.figures, {}
        return taken

    def _count(self, name: str, seconds: float) -> None:
        self.figures[name] = self.figures.get(name, 0.0) + seconds

    def _everywhere(self, here: bool) -> bool:
        if self.group is None:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def _write(
        self, step: int, boxes: BoxDict, state: dict[str, Any], is_best: bool, made: Any
    ) -> float:
        """Writes the checkpoint and returns the seconds that it took. made: the event of Copy."""
        start = time.monotonic()
        transaction = Transaction(self.folder / step_name(step), state, self.carried)
        try:
            write_together(
                boxes,
                transaction,
                self.group,
                self._prepare,
                lambda: self._has_appeared(step, is_best),
                lambda: None if made is None else made.synchronize(),
            )
        except SaveFailed:
            if self.is_first:
                transaction.abandon()
            raise
        return time.monotonic() - start

    def _prepare(self, needed: int) -> None:
        self._remove_left_overs()
        self._make_room(needed + sum(map(len, self.carried.values())))

    def _make_room(self, needed: int) -> None:
        """If a checkpoint of `needed` bytes does not fit on the disk, removes as many of the oldest as necessary before
        it is written instead of after; always keeps the best and the newest that is known to be undamaged."""
        existing = {step_of(path) or 0: path for path in checkpoints_of(self.folder.parent)}
        if not self.keep or self.good_step is None or self.good_step not in existing:
            return
        missing, doomed = needed - shutil.disk_usage(self.folder).free, list[Path]()
        best = named_best(self.folder.parent)
        for step, path in existing.items():
            if missing > 0 and step < self.good_step and path.name != best:
                doomed.append(path)
                missing -= sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in doomed if missing <= 0 else ():
            _remove(path)
            self.lines.append(f"{path}: removed to make room before writing the next checkpoint")

    def _remove_left_overs(self) -> None:
        """Removes the remains of earlier saves and removals that were killed."""
        for path in self.folder.glob(".step_*"):
            step = step_of(path)
            needed = step is not None and not (self.folder / step_name(step)).exists()
            if not needed and (LEFT_OVER_NAME.match(path.name) or step is not None):
                shutil.rmtree(path, ignore_errors=True)

    def _has_appeared(self, step: int, is_best: bool) -> None:
        """Updates `latest`, and `best` if `is_best`, and removes old checkpoints. The new checkpoint exists whether or
        not this succeeds, so the ranks need not agree on it."""
        self.good_step = step
        try:
            write_durably(self.folder / LATEST, step_name(step) + "\n")
            if is_best:
                write_durably(self.folder / BEST, step_name(step) + "\n")
            self._set_aside_later(step)
            self._remove_old(step)
        except OSError as error:
            self.lines.append(
                f"checkpoint of step {step} is saved, but {LATEST}, {BEST} or older ones could not be updated: {error}"
            )

    def _set_aside_later(self, step: int) -> None:
        """Renames checkpoints of later steps that were found damaged when the run started from an older one, so that no
        start uses them. Leaves any others as they are."""
        for path in checkpoints_of(self.folder.parent):
            if (step_of(path) or 0) > step and path.name in self.damaged:
                aside = path.with_name(f"{path.name.lstrip('.')}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                self.lines.append(f"{path}: damaged and skipped: renamed to {aside.name}")
            elif (step_of(path) or 0) > step and path.name not in self.strange:
                self.strange.add(path.name)
                self.lines.append(
                    f"{path}: of a later step than {step} and not written by this start: left unchanged"
                )

    def _remove_old(self, step: int) -> None:
        """Removes all checkpoints up to that step except the newest `keep` and the best. The one just written is
        undamaged, so a good one always remains."""
        own = [path for path in checkpoints_of(self.folder.parent) if (step_of(path) or 0) <= step]
        best = named_best(self.folder.parent)
        for path in own[: -self.keep] if self.keep else []:
            if path.name != best:
                _remove(path)


def _remove(path: Path) -> None:
    """Removes a checkpoint. Renames it first, so that a partly removed one is never mistaken for a checkpoint."""
    doomed = path.with_name(f".{step_name(step_of(path) or 0)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def failure_line(error: BaseException) -> str:
    """A log line with each rank that failed, and why."""
    if isinstance(error, SaveFailed):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}"
