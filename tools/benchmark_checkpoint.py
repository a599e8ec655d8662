#!/usr/bin/env python3
"""Compare the save and load rates of a checkpoint with torch.save, torch.load and the disk itself, and measure the
stall: by how much a background save delays training steps.

All write the same fp32 tensors and end with fsync; all read into existing tensors, with nothing in the page cache. Ours
hashes every byte in both directions. Rates are medians over rounds in which each takes its turn. For the stall, a step
is a matrix product on one thread, as on a rank.
"""

import megalite.ranks.startup  # noqa: F401  (first: see there)

# isort: split
import gc
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.files import Checkpoint, checkpoints_of, verify
from megalite.checkpoint.save import Saver
from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, at_least, positive
from megalite.ranks.run_program import run_program

COLUMNS, BLOCK_BYTES = 1024, 8 << 20
STEP_SIZE, STEPS_ALONE = 1024, 20  # size of a step's matrices; steps timed without a save
STATE = {"step": 1, "consumed_samples": 0, "consumed_tokens": 0, "seed": 0, "model": {}}
Tensors = dict[str, torch.Tensor]


def disk_write(path: Path, tensors: Tensors) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors.values():
            content = tensor.view(-1).view(torch.uint8).numpy().data
            for first in range(0, len(content), BLOCK_BYTES):
                file.write(content[first : first + BLOCK_BYTES])
        os.fsync(file.fileno())


def disk_read(path: Path, tensors: Tensors) -> None:
    with path.open("rb", buffering=0) as file:
        for tensor in tensors.values():
            content = tensor.view(-1).view(torch.uint8).numpy().data
            for first in range(0, len(content), BLOCK_BYTES):
                file.readinto(content[first : first + BLOCK_BYTES])  # type: ignore[attr-defined]


def torch_save(path: Path, tensors: Tensors) -> None:
    torch.save(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def torch_load(path: Path, tensors: Tensors) -> None:
    for name, value in torch.load(path, weights_only=True).items():
        tensors[name].copy_(value)


def our_load(run: Path, tensors: Tensors) -> None:
    folder = checkpoints_of(run)[-1]
    verify(folder)
    checkpoint = Checkpoint.open(folder)
    for name, tensor in tensors.items():
        tensor.copy_(checkpoint.read(name))


def uncached(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def measure(folder: Path, tensors: Tensors, rounds: int) -> dict[str, list[float]]:
    """Seconds of each operation, one value per round."""
    saver = Saver(folder / "run", keep=1)
    boxes = {f"weight/{n}": [Box(tuple(t.shape), (0, 0), t)] for n, t in tensors.items()}
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for step in range(1, rounds + 1):
        uncached(folder)
        note("write: disk", timed(disk_write, folder / "plain", tensors))
        uncached(folder)
        note("write: torch.save", timed(torch_save, folder / "torch", tensors))
        uncached(folder)
        note(
            "first copy" if step == 1 else "copy, which steps wait for",
            timed(saver.save, step, boxes, STATE),
        )
        saver.wait()
        note("write: checkpoint", saver.taken_figures()["checkpoint_write_seconds"])
        for name, call, path in (("disk", disk_read, folder / "plain"), ("torch.load", torch_load, folder / "torch"),
                                 ("checkpoint", our_load, folder / "run")):  # fmt: skip
            uncached(folder)
            gc.collect()
            note(f"read: {name}", timed(call, path, tensors))
    return seconds


def stalls(folder: Path, tensors: Tensors, rounds: int) -> list[tuple[float, float, int]]:
    """For each round: (seconds that steps waited for the copy, seconds by which steps were slower while the file was
    written, number of steps meanwhile)."""
    saver = Saver(folder / "stall", keep=1)
    boxes = {f"weight/{n}": [Box(tuple(t.shape), (0, 0), t)] for n, t in tensors.items()}
    matrix = torch.randn(STEP_SIZE, STEP_SIZE)
    results = []
    for step in range(1, rounds + 2):
        alone = statistics.median(timed(torch.mm, matrix, matrix) for _ in range(STEPS_ALONE))
        copied = timed(saver.save, step, boxes, STATE)
        during = []
        while not saver.has_ended:
            during.append(timed(torch.mm, matrix, matrix))
        saver.wait()
        results.append((copied, sum(during) - alone * len(during), len(during)))
    return results[1:]  # the first copy allocates its memory


def made_up_tensors(gib: float) -> Tensors:
    """64 tensors of so many GiB together. ConfigError where the memory has no room for them."""
    rows = math.ceil(gib * 2**30 / 4 / COLUMNS / 64)
    try:
        return {f"layers.{i}.weight": torch.randn(rows, COLUMNS) for i in range(64)}
    except (RuntimeError, OverflowError):  # torch's, of its allocator
        raise ConfigError(f"--gib: {gib:g}: must fit into this machine's memory") from None


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default="checkpoint_benchmark", help="a new folder on the disk to measure"
    )
    parser.add_argument("--gib", type=positive, default=1.0, help="size of the tensors")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    folder.mkdir(parents=True)
    try:
        tensors = made_up_tensors(options.gib)
        seconds = measure(folder, tensors, max(2, options.rounds))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        stalled = stalls(folder, tensors, options.rounds)
        torch.set_num_threads(threads)
        size = sum(tensor.nbytes for tensor in tensors.values())
    finally:
        shutil.rmtree(folder)
    rates = {name: size / statistics.median(values) / 1e9 for name, values in seconds.items()}
    print(
        f"{size / 1e9:.2f} GB in {len(tensors)} tensors, {len(os.sched_getaffinity(0))} cores, medians of rounds"
    )
    for name, rate in sorted(rates.items()):
        values = seconds[name]
        spread = f"{size / max(values) / 1e9:.2f} to {size / min(values) / 1e9:.2f}"
        beside = ""
        if ": " in name:
            way = name.split(": ")[0]
            plain = "torch.save" if way == "write" else "torch.load"
            beside = f"  {rate / rates[f'{way}: disk']:.2f} of disk  {rate / rates[f'{way}: {plain}']:.2f} of {plain}"
        print(f"{name:28} {rate:6.2f} GB/s ({spread}){beside}")
    copied, slower, steps = (statistics.median(values) for values in zip(*stalled, strict=True))
    parts = f"{copied:.2f} for the copy, {slower:.2f} in {steps:.0f} steps during the write"
    print(f"{'stall of a save':28} {copied + slower:6.2f} s: {parts}")
    return 0


if __name__ == "__main__":
    run_program(main)
