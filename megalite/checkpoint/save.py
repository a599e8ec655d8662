"""Saving, all ranks together and in the background: a copy in memory, then files, while training continues. On a GPU
the copy itself is made while the next step's forwards and backwards run, and its update alone waits for it.

Where a rank has no room for its copy, the steps wait instead for files written from the live tensors. Each element has
one owner: the rank whose copy counts (layers.py), and of ZeRO-0's equal copies on the data axis each rank its share.
Errors on any rank reach every rank; the older checkpoints then remain. Next: weights.py.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Sequence
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
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import Shard


def owned_boxes(shards: Sequence[Shard], grid: Grid, replicated: bool) -> BoxDict:
    """What this rank writes, as views. replicated: all ranks that hold copies of a slice hold the same
    shards (ZeRO-0)."""
    result: BoxDict = {}
    for shard in shards:
        if not shard.placement.counted:
            continue
        count = shard.master.numel()
        replicas: Axis = getattr(grid, shard.placement.replicas)
        first, stop = _part(count, replicas) if replicated else (0, count)
        place = shard.placement
        for kind, values in {WEIGHT: shard.master, **shard.state}.items() if first < stop else ():
            held, start = values[first:stop], shard.start + first
            box = Box(place.full_shape, place.offsets, held, place.shape, start)
            result[f"{kind}/{place.name}"] = [box]
    return result


def _part(count: int, axis: Axis) -> tuple[int, int]:
    """The half-open range that this rank of the axis writes of `count` elements; empty on some ranks where there are
    more ranks than elements (layers.share would give those an element that another rank writes too)."""
    return axis.rank * count // axis.size, (axis.rank + 1) * count // axis.size


def stream_beside(device: torch.device) -> Any:
    """A stream of a device for what its steps need not wait for; None for a CPU, which does all at once."""
    return None if device.type == "cpu" else torch.Stream(device)


def own_device() -> int | None:
    """Index of this process's device; None where it has none."""
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else None


def use_device(index: int | None) -> None:
    """To be called in a new thread: it begins with device 0, where every rank would then take memory."""
    if index is not None:
        torch.accelerator.set_device_index(index)


def taken_bytes(size: int, page_locked: bool) -> int:
    """Main memory that a tensor of `size` bytes takes. Of page-locked memory torch hands out powers of two
    (ATen/core/CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if page_locked else size


class Copy:
    """Memory of this process that boxes are copied into, kept from one save to the next: allocating it again takes
    several times as long as filling it.

    From a GPU the copies are made in a stream of their own, behind the work that the device has; the host does not
    wait. `made` is an event after the last of them, None on a CPU. Until it has come, the boxes must not change
    (Engine.update_waits_for), and the memory must not be read.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        """limit_bytes: of the copy; None: half of what is free on this node, shared among its ranks."""
        self.limit_bytes = limit_bytes
        self.memory: dict[torch.dtype, Tensor] = {}
        self.page_locked = False
        self.made: Any = None
        self._streams: dict[torch.device, Any] = {}

    def take(self, boxes: BoxDict) -> BoxDict | None:
        """The same values in memory of their own; None where that is more than the limit, or than there is."""
        self.made = None
        counts: Counter[torch.dtype] = Counter()
        for box in (box for some in boxes.values() for box in some):
            counts[box.values.dtype] += box.values.numel()
        device = _device_of(boxes)
        self.page_locked = device.type != "cpu"  # only there does a device write by itself
        wanted = sum(
            taken_bytes(dtype.itemsize * count, self.page_locked) for dtype, count in counts.items()
        )
        free = (
            psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            + self.held_bytes
        )
        if wanted > (free if self.limit_bytes is None else self.limit_bytes):
            self.memory.clear()
            return None
        for dtype, count in counts.items():
            if dtype not in self.memory or self.memory[dtype].numel() != count:
                self.memory.pop(dtype, None)
                try:
                    self.memory[dtype] = torch.empty(
                        count, dtype=dtype, pin_memory=self.page_locked
                    )
                except RuntimeError:  # torch's word for no memory
                    return None
        if device not in self._streams:
            self._streams[device] = stream_beside(device)
        stream = self._streams[device]
        if stream is not None:  # the update of this step comes first
            stream.wait_stream(torch.accelerator.current_stream())
        with nullcontext() if stream is None else stream:
            result = self._filled(boxes)
        self.made = None if stream is None else stream.record_event()
        return result

    def _filled(self, boxes: BoxDict) -> BoxDict:
        used: Counter[torch.dtype] = Counter()
        result: BoxDict = {}
        for name, some in boxes.items():
            result[name] = []
            for box in some:
                dtype, count = box.values.dtype, box.values.numel()
                place = self.memory[dtype].narrow(0, used[dtype], count).view(box.values.shape)
                place.copy_(box.values.detach(), non_blocking=True)
                result[name].append(replace(box, values=place))
                used[dtype] += count
        return result

    @property
    def held_bytes(self) -> int:
        """What it takes of this process's memory."""
        return sum(taken_bytes(memory.nbytes, self.page_locked) for memory in self.memory.values())


def _device_of(boxes: BoxDict) -> torch.device:
    """The device that copies come from: of boxes on the CPU and on a device, as with offload, the device."""
    found = {box.values.device for some in boxes.values() for box in some}
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))


class Saver:
    """Saves a run's checkpoints: one at a time, in a thread. Every rank makes one and calls it at the same steps."""

    def __init__(
        self,
        run_dir: str | Path,
        keep: int,
        copy_limit_bytes: int | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        """keep: newest checkpoints to keep, 0 all; copy_limit_bytes: as Copy's; timeout: of a collective."""
        self.folder, self.keep = Path(run_dir) / "checkpoints", keep
        self.good_step: int | None = None  # of the newest checkpoint that is known to be whole
        self.damaged, self.strange = set[str](), set[str]()
        self.carried: dict[str, bytes] = {}
        """On rank 0, small files that go into every checkpoint, by name."""
        # Collectives of the thread must not mix with those of the steps; gloo's need no device.
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
        """Since the last look (`taken_figures`): checkpoint_seconds, that steps have waited; of saves that ended,
        checkpoint_write_seconds, and checkpoint_copy_bytes, this rank's memory for the copy (0: the steps waited)."""
        self.told: list[str] = []
        """On rank 0, for the log: checkpoints that were removed early or renamed, or could not be."""

    def starts_from(self, step: int, damaged: Collection[str]) -> None:
        """The run starts from the checkpoint of that step, where there is one, and has found those of these names
        damaged."""
        self.good_step, self.damaged = step, {*damaged}

    def save(self, step: int, boxes: BoxDict, state: dict[str, Any], is_best: bool = False) -> None:
        """Starts saving. What is given may change as soon as this returns, on a GPU as soon as `copy.made` has come.
        is_best: `best` is to name it. An earlier save still in progress is waited for, and its error raised. Where a
        rank has no room for its copy, this one is waited for by all."""
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
            self.copy.memory.clear()
            futures.wait([self.running])
        self._count("checkpoint_seconds", time.monotonic() - start)

    def wait(self) -> None:
        """Waits for the save in progress. Raises SaveFailed (on every rank) where it failed."""
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
        """Seconds that it took. made: as Copy's."""
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
        """Where a checkpoint of so many bytes does not fit, the oldest go before it is written and not after, as many
        as it takes; the newest that is known to be whole and the best stay in any case."""
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
            self.told.append(
                f"{path}: removed before the next checkpoint is written, which had no room"
            )

    def _remove_left_overs(self) -> None:
        """What a kill left of earlier saves and removals."""
        for path in self.folder.glob(".step_*"):
            step = step_of(path)
            needed = step is not None and not (self.folder / step_name(step)).exists()
            if not needed and (LEFT_OVER_NAME.match(path.name) or step is not None):
                shutil.rmtree(path, ignore_errors=True)

    def _has_appeared(self, step: int, is_best: bool) -> None:
        """`latest`, and `best` where it is, name it and others go. It is there whatever happens here, and so the ranks
        need not agree."""
        self.good_step = step
        try:
            write_durably(self.folder / LATEST, step_name(step) + "\n")
            if is_best:
                write_durably(self.folder / BEST, step_name(step) + "\n")
            self._set_aside_later(step)
            self._remove_old(step)
        except OSError as error:
            self.told.append(
                f"checkpoint of step {step} is saved; {LATEST}, {BEST} or others could not be changed: {error}"
            )

    def _set_aside_later(self, step: int) -> None:
        """Checkpoints of later steps that were found damaged when the run started from an older one: no start must come
        back to them. Any others are not this run's to touch."""
        for path in checkpoints_of(self.folder.parent):
            if (step_of(path) or 0) > step and path.name in self.damaged:
                aside = path.with_name(f"{path.name.lstrip('.')}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                self.told.append(f"{path}: damaged and skipped: is now {aside.name}")
            elif (step_of(path) or 0) > step and path.name not in self.strange:
                self.strange.add(path.name)
                self.told.append(
                    f"{path}: of a later step than {step}: not written by this start, and left as it is"
                )

    def _remove_old(self, step: int) -> None:
        """Keeps the newest `keep` checkpoints up to that step, and the best; the one just written is whole, so a good
        one always stays."""
        own = [path for path in checkpoints_of(self.folder.parent) if (step_of(path) or 0) <= step]
        best = named_best(self.folder.parent)
        for path in own[: -self.keep] if self.keep else []:
            if path.name != best:
                _remove(path)


def _remove(path: Path) -> None:
    """Hides a checkpoint first, so that a half removed one is never taken for whole."""
    doomed = path.with_name(f".{step_name(step_of(path) or 0)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def failure_line(error: BaseException) -> str:
    """One line for the log: each rank that failed and why."""
    if isinstance(error, SaveFailed):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return f"{type(error).__name__}: {error}"
