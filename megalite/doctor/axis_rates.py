"""The doctor's program on each rank: an all-reduce on each axis of the grid, and messages in both directions on the
pipe axis, with their rates. For GPUs that plan/device_figures.py lists and for calibrated machines it also prints an
all-reduce's share of the known rate, and exits with 1 if an axis is slow.

python axis_rates.py PIPE TENSOR CONTEXT EXPERT [CALIBRATION]      (under launcher/run.py's start)
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megalite.ranks.startup  # noqa: F401  (first: see there)
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.run_program import run_program

MIB = 2**20
REDUCED = {"cpu": 16}  # MiB per all-reduce, by type of device
REDUCED_ON_DEVICES = 256
SENT = {"cpu": 4}  # MiB between neighbours on the pipe axis
SENT_ON_DEVICES = 128  # more than NCCL buffers: they only pass once a receive is posted
REPEATS = 3


def main(arguments: list[str]) -> int:
    """Prints a line for each axis; returns 1 if one is far slower than its known rate (collective)."""
    here, _ = start_ranks(lambda thorough: None)
    from megalite.parallel.grid import Grid
    from megalite.ranks.accelerator import use_accelerator

    # Added by a launcher.
    words = [word for word in arguments if not word.startswith("--local_rank")]
    pipe, tensor, context, expert = map(int, words[:4])
    grid = Grid.build(pipe, tensor, context, expert)
    kind = use_accelerator().device_name()
    known = known_device(words[4:], kind, here.local_size)
    is_slow = False
    for line, slow in (*all_reduces(grid, kind, known), *neighbours(grid, kind)):
        is_slow |= slow
        if here.rank == 0:
            print(line, flush=True)
    stop_ranks()
    return int(is_slow)


def known_device(calibration: list[str], kind: str, local_size: int) -> Any:
    """The device's figures: from the calibration file, else by the GPU's name; None if unknown."""
    import torch

    from megalite.plan.device_figures import device_called, read_device

    if calibration:
        known = read_device(Path(calibration[0]), "megalite.train.calibration")
    elif kind != "cpu":
        known = device_called(torch.get_device_module(kind).get_device_name())
    else:
        known = None
    return None if known is None else replace(known, node_ranks=local_size)


def all_reduces(grid: Any, kind: str, known: Any) -> Iterator[tuple[str, bool]]:
    """For each axis of several ranks: a line, and whether it is slow (collective)."""
    import torch
    import torch.distributed as dist

    from megalite.doctor.links import SLOW, known_share, share_words
    from megalite.topology.axes import SHOWN_AXES

    reduced = REDUCED.get(kind, REDUCED_ON_DEVICES)
    values = torch.ones(reduced * MIB // 4, device=kind)
    for axis in (getattr(grid, name) for name in SHOWN_AXES):
        if axis.size == 1:
            continue
        group, size = axis.group, axis.size
        seconds = seconds_of(lambda group=group: dist.all_reduce(values, group=group), kind)
        sent_bytes = 2 * (size - 1) / size * values.nbytes  # by each rank, in a ring
        line = f"{axis.name} axis, {size} ranks: all-reduce of {reduced} MiB {rate(seconds, sent_bytes)}"
        if known is None:
            yield line, False
            continue
        apart = axis.ranks[1] - axis.ranks[0]
        share = known_share(known, size, apart, grid.world_size, values.nbytes, seconds)
        yield f"{line}, {share_words(known, share)}", share < SLOW


def neighbours(grid: Any, kind: str) -> Iterator[tuple[str, bool]]:
    """A line about messages on the pipe axis, if it has several ranks (collective)."""
    import torch

    if grid.pipe.size == 1:
        return
    sent = SENT.get(kind, SENT_ON_DEVICES)
    given = torch.ones(sent * MIB // 4, device=kind)
    seconds = seconds_of(lambda: exchange(grid.pipe, given), kind)
    what = f"{sent} MiB between neighbours, both directions at once,"
    yield f"pipe axis, {grid.pipe.size} ranks: {what} {rate(seconds, given.nbytes)}", False


def seconds_of(work: Callable[[], Any], kind: str) -> float:
    """Seconds of the slowest rank, after a warm-up (collective)."""
    import torch
    import torch.distributed as dist

    from megalite.parallel.clock import wait_for

    device = torch.device(kind)
    work()
    wait_for(device)  # the barrier is gloo's, and does not
    dist.barrier()
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
        wait_for(device)
    seconds = torch.tensor([(time.perf_counter() - start) / REPEATS], device=kind)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def rate(seconds: float, sent_bytes: float) -> str:
    """The rate as text. sent_bytes: per rank and direction."""
    return f"in {1e3 * seconds:.0f} ms, {sent_bytes / seconds / 1e9:.2f} GB/s each way per rank"


def exchange(axis: Any, given: Any) -> list[Any]:
    """Sends `given` to both neighbours on the pipe axis and returns what they send, the lower one's first. All messages
    are in flight at once, each direction on its own group (Axis.towards). The directions are posted one after the
    other: with NCCL the first message of two ranks on a group waits for both.
    """
    import torch
    import torch.distributed as dist

    here, works, rooms = axis.rank, [], []
    for source, target in ((here - 1, here + 1), (here + 1, here - 1)):
        if 0 <= source < axis.size:
            rooms.append(torch.empty_like(given))
            group = axis.towards(source, here)
            works.append(dist.irecv(rooms[-1], axis.ranks[source], group=group))
        if 0 <= target < axis.size:
            works.append(dist.isend(given, axis.ranks[target], group=axis.towards(here, target)))
    for work in works:
        work.wait()
    return rooms


if __name__ == "__main__":
    run_program(main)
