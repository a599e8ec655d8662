"""The rank's side of the doctor: an all-reduce on each axis of the grid, and messages both ways on the pipe axis, with
their rates. Of GPUs in plan/devices.py, and of a machine that was calibrated, an all-reduce's share of what the links
are known for is told too; ends with 1 where one is slow.

python axes.py PIPE TENSOR CONTEXT EXPERT [CALIBRATION]      (under launcher/run.py's start)
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.ranks.launch import run_program, start_ranks, stop_ranks

MIB = 2**20
REDUCED = {"cpu": 16}  # MiB that are summed, by type of device
REDUCED_ON_DEVICES = 256
SENT = {"cpu": 4}  # MiB between neighbours on the pipe axis
SENT_ON_DEVICES = 128  # more than NCCL buffers: only a receive that is there lets them pass
REPEATS = 3


def main(arguments: list[str]) -> int:
    here, _ = start_ranks(lambda thorough: None)
    import torch
    import torch.distributed as dist

    from megalite.doctor.links import SLOW, known_share, share_words
    from megalite.parallel.grid import Grid
    from megalite.plan.devices import device_called, read_device
    from megalite.ranks.accelerator import use_accelerator
    from megalite.topology.axes import TOLD

    words = [word for word in arguments if not word.startswith("--local_rank")]  # a launcher's
    pipe, tensor, context, expert = map(int, words[:4])
    grid = Grid.build(pipe, tensor, context, expert)
    kind = use_accelerator().device_name()
    reduced = REDUCED.get(kind, REDUCED_ON_DEVICES)
    values = torch.ones(reduced * MIB // 4, device=kind)
    known, slow = None, False
    if words[4:]:
        known = read_device(Path(words[4]), "megalite.train.calibration")
    elif kind != "cpu":
        known = device_called(torch.get_device_module(values.device).get_device_name(values.device))
    if known is not None:
        known = replace(known, node_ranks=here.local_size)

    def seconds_of(work: Callable[[], Any]) -> float:
        """Of the slowest rank, after one to begin with."""
        work()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(REPEATS):
            work()
            values[:1].sum().item()  # waits for the device
        seconds = torch.tensor([(time.perf_counter() - start) / REPEATS], device=kind)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return seconds.item()

    def tell(what: str, seconds: float, moved: float, beside: str = "") -> None:
        """moved: bytes that a rank sends."""
        if here.rank == 0:
            rate = f"{moved / seconds / 1e9:.2f} GB/s each way a rank{beside}"
            print(f"{what} in {1e3 * seconds:.0f} ms, {rate}", flush=True)

    for name in TOLD:
        axis = getattr(grid, name)
        if axis.size > 1:
            group, size = axis.group, axis.size
            seconds = seconds_of(lambda group=group: dist.all_reduce(values, group=group))
            moved = 2 * (size - 1) / size * values.nbytes  # by each rank, in a ring
            beside = ""
            if known is not None:
                apart, world = axis.ranks[1] - axis.ranks[0], grid.world_size
                share = known_share(known, size, apart, world, values.nbytes, seconds)
                slow, beside = slow or share < SLOW, f", {share_words(known, share)}"
            told = f"{name} axis, {size} ranks: all-reduce of {reduced} MiB"
            tell(told, seconds, moved, beside)
    if grid.pipe.size > 1:
        sent = SENT.get(kind, SENT_ON_DEVICES)
        given = torch.ones(sent * MIB // 4, device=kind)
        seconds = seconds_of(lambda: exchange(grid.pipe, given))
        told = f"pipe axis, {pipe} ranks: {sent} MiB between neighbours, both ways at once,"
        tell(told, seconds, given.nbytes)
    stop_ranks()
    return int(slow)


def exchange(axis: Any, given: Any) -> list[Any]:
    """What the neighbours on the pipe axis send, lower first, to whom this rank sends `given`: all messages are on
    their way at once, each direction on its own group (Axis.towards).

    One direction is asked for after the other: with NCCL the first message of two ranks on a group waits for both.
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
