"""The rank's side of the doctor: an all-reduce on each axis of the grid, with its rate.

python axes.py PIPE TENSOR CONTEXT EXPERT      (under launcher/run.py's start)
"""

import time

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.ranks.launch import run_program, start_ranks, stop_ranks

ELEMENTS = 2**22  # fp32: 16 MiB
REPEATS = 3


def main(arguments: list[str]) -> int:
    here, _ = start_ranks(lambda thorough: None)
    import torch
    import torch.distributed as dist

    from megalite.parallel.grid import Grid
    from megalite.ranks.accelerator import use_accelerator
    from megalite.topology.axes import TOLD

    pipe, tensor, context, expert = (int(word) for word in arguments if word.isdigit())
    grid = Grid.build(pipe, tensor, context, expert)
    values = torch.ones(ELEMENTS, device=use_accelerator().device_name())
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
            print(f"{name} axis, {axis.size} ranks: all-reduce of 16 MiB in {line}", flush=True)
    stop_ranks()
    return 0


if __name__ == "__main__":
    run_program(main)
