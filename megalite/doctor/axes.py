"""The rank's side of the doctor: an all-reduce on each axis of the grid, with its rate. Of a GPU in plan/devices.py, or
a machine that was calibrated, what its links are known for is told too; ends with 1 where an axis is slow.

python axes.py PIPE TENSOR CONTEXT EXPERT [CALIBRATION]      (under launcher/run.py's start)
"""

import time
from dataclasses import replace
from pathlib import Path

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.ranks.launch import run_program, start_ranks, stop_ranks

ELEMENTS = 2**22  # fp32: 16 MiB
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
    values = torch.ones(ELEMENTS, device=use_accelerator().device_name())
    known = None
    if words[4:]:
        known = read_device(Path(words[4]), "megalite.train.calibration")
    elif values.device.type != "cpu":
        known = device_called(torch.get_device_module(values.device).get_device_name(values.device))
    if known is not None:
        known = replace(known, node_ranks=here.local_size)
    slow = False
    for name in TOLD:
        axis = getattr(grid, name)
        if axis.size == 1:
            continue
        dist.all_reduce(values, group=axis.group)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(values, group=axis.group)
            values.sum().item()  # waits for the device
        seconds = torch.tensor([(time.perf_counter() - start) / REPEATS], device=values.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        if here.rank == 0:
            moved = 2 * (axis.size - 1) / axis.size * values.nbytes  # by each rank, in a ring
            rate = moved / seconds.item() / 1e9
            milliseconds = 1e3 * seconds.item()
            line = f"{milliseconds:.0f} ms, {rate:.2f} GB/s each way a rank"
            if known is not None:
                spacing = axis.ranks[1] - axis.ranks[0]
                share = known_share(
                    known, axis.size, spacing, grid.world_size, values.nbytes, seconds.item()
                )
                slow = slow or share < SLOW
                line += f", {share_words(known, share)}"
            print(f"{name} axis, {axis.size} ranks: all-reduce of 16 MiB in {line}", flush=True)
    verdict = torch.tensor([float(slow)], device=values.device)
    dist.all_reduce(verdict)  # rank 0's
    stop_ranks()
    return int(verdict.item() > 0)


if __name__ == "__main__":
    run_program(main)
