"""Measures the speed of a machine on this rank: operations of a layer, steps of the real engine, collectives.

`alone` and `together` return the rows that plan/calibration.py reads. Next: calibrate.py, which starts the ranks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalite.config import Config
from megalite.parallel.clock import wait_for
from megalite.prove.clocks import Times, cores, others_share, seconds_of
from megalite.prove.trace import Session
from megalite.ranks.accelerator import use_accelerator

WARMUP_STEPS, STEPS = 2, 7
BUSY_TURNS = 7
MESSAGES = {2**12: 40, 2**15: 30, 2**18: 12, 2**21: 4, 2**23: 2}
"""Bytes of a collective's tensor, and how often the collective is repeated."""
BETWEEN = (256, 256, 768)  # a product between collectives: rows, features in, features out


@dataclass(frozen=True)
class TimedSizes:
    """Sizes of the timed operations. products: (rows, features in, features out); the first is so small that it shows
    the overhead of a call, the last ones so large that they show the rate. pointwise, optimizer: elements. attention:
    (batch, heads, length, head size). dtype: of attention."""

    products: list[tuple[int, int, int]]
    pointwise: list[int]
    attention: list[tuple[int, int, int, int]]
    optimizer: int
    dtype: str


CPU = TimedSizes(
    [
        *((16, 32, 32), (64, 128, 128), (128, 128, 384), (256, 256, 256), (256, 768, 256)),
        *((256, 256, 768), (512, 256, 1024), (512, 512, 512), (512, 512, 1536), (1024, 512, 512)),
    ],
    [2**14, 2**17, 2**20, 2**22],
    [(4, 4, 128, 32), (2, 4, 256, 64), (1, 8, 512, 64)],
    2**21,
    "fp32",
)
GPU = TimedSizes(
    [
        *((16, 32, 32), (1024, 1024, 1024), (2048, 4096, 4096), (4096, 4096, 4096)),
        *((8192, 4096, 11008), (8192, 8192, 8192), (16384, 8192, 8192)),
    ],
    [2**26, 2**27, 2**28],
    [(4, 16, 2048, 128), (2, 32, 4096, 128), (1, 32, 8192, 128)],
    2**27,
    "bf16",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def own_device() -> torch.device:
    """This rank's device. On a CPU it is limited to one thread, since a Device's figures are per core."""
    device = torch.device(use_accelerator().device_name())
    if device.type == "cpu":
        torch.set_num_threads(1)
    return device


def alone(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Times operations and steps of the configs on one rank that has this machine to itself."""
    device = own_device()
    sizes = CPU if device.type == "cpu" else GPU
    return {
        "products": [_product(*shape, name, device) for name in DTYPES for shape in sizes.products],
        "pointwise": [_pointwise(count, device) for count in sizes.pointwise],
        "attention": [_attention(*shape, sizes.dtype, device) for shape in sizes.attention],
        "optimizer": [_optimizer(sizes.optimizer, device)],
        "memory_bytes": _memory_bytes(device),
        "gpu": _gpu_name(device),
        **steps(configs),
    }


def measured(what: str, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Calls `together`, `alone` or `steps` (collective, except `alone`)."""
    return together() if what == "together" else {"alone": alone, "steps": steps}[what](configs)


def steps(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Times steps of the configs (collective)."""
    own_device()
    return {"steps": [{"config": config, "seconds": _step(config)} for config in configs]}


def _product(m: int, k: int, n: int, dtype: str, device: torch.device) -> dict[str, Any]:
    a, weight = (torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in ((m, k), (n, k)))
    seconds = seconds_of(lambda: F.linear(a, weight), device)
    return {"dtype": dtype, "m": m, "k": k, "n": n, "seconds": seconds}


def _pointwise(count: int, device: torch.device) -> dict[str, float]:
    """a·b with a new result, like most operations of a layer."""
    a, b = torch.randn(count, device=device), torch.randn(count, device=device)
    return {"moved_bytes": 3 * a.nbytes, "seconds": seconds_of(lambda: a * b, device)}


def _attention(
    batch: int, heads: int, length: int, size: int, dtype: str, device: torch.device
) -> dict[str, Any]:
    q, k, v = (
        torch.randn(batch, heads, length, size, device=device).to(DTYPES[dtype]) for _ in range(3)
    )
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)
    flops = 2.0 * batch * heads * length**2 * size  # two products, each of half the scores
    return {"dtype": dtype, "flops": flops, "seconds": seconds}


def _optimizer(numbers: int, device: torch.device) -> dict[str, float]:
    """Adam's update: reads weight, gradient and two moments, writes all but the gradient."""
    weight = torch.nn.Parameter(torch.randn(numbers, device=device))
    weight.grad = torch.randn_like(weight)
    adam = torch.optim.AdamW([weight], fused=True)
    return {"moved_bytes": 7 * weight.nbytes, "seconds": seconds_of(adam.step, device)}


def _step(config: dict[str, Any]) -> float:
    """Median seconds of a step of the real engine."""
    session = Session.build(Config.from_dict(config))
    device = torch.device(session.engine.device or "cpu")
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found = []
    for step in range(WARMUP_STEPS + STEPS):
        batches = session.batches(step)
        wait_for(device)
        start = clock()
        session.train(batches)
        wait_for(device)
        found.append(clock() - start)
    return median(found[WARMUP_STEPS:])


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cpu":
        return float(psutil.virtual_memory().total)
    return float(torch.get_device_module(device).get_device_properties(device).total_memory)


def _gpu_name(device: torch.device) -> str:
    """The GPU's name; empty on a CPU."""
    return "" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def together() -> dict[str, Any]:
    """Times collectives of 2, 4 and 8 ranks, and cores that all compute at once; the same result on all ranks
    (collective)."""
    device, begin = own_device(), Times.now()
    share = _busy_share(device)
    rows = []
    for size in (2, 4, 8):
        if size > dist.get_world_size():
            break
        group = dist.new_group(list(range(size)))
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "reduce", "send"):
            for count, times in MESSAGES.items():
                if kind != "send" or size == 2:
                    rows.append(_collective(kind, group, size, count, times, device))
    spent = _gathered(Times.now().since(begin))
    own = sum(rank["processor_seconds"] for rank in spent)
    others = others_share(spent[0]["wall_seconds"], spent[0]["machine_seconds"], own)
    return {"busy_share": share, "collectives": rows, "others_share": others}


def _busy_share(device: torch.device) -> float:
    """The speed of a core while all cores compute, relative to one alone: the median of several turns (collective); 1
    on GPUs, which share nothing."""
    if device.type != "cpu" or min(cores(), dist.get_world_size()) == 1:
        return 1.0

    def seconds() -> float:
        products = [_product(*shape, "fp32", device) for shape in CPU.products[-2:]]
        rows = [*products, _pointwise(CPU.pointwise[-1], device)]
        return sum(row["seconds"] for row in rows)

    rank, shares = dist.get_rank(), []
    for _ in range(BUSY_TURNS):
        alone = seconds() if rank == 0 else 0.0
        dist.barrier()
        busy = seconds() if rank < cores() else 0.0
        everyone = _gathered({"alone": alone, "busy": busy})
        shares.append(everyone[0]["alone"] / median(row["busy"] for row in everyone[: cores()]))
    return min(1.0, median(shares))


def _collective(
    kind: str, group: Any, size: int, count: int, times: int, device: torch.device
) -> dict[str, Any]:
    """Times a collective of the first `size` ranks while the others wait (collective). bytes: of the whole tensor, or
    of the message.

    It is timed alone, and on a CPU also after a product, as in a step, minus the product's time: then ranks do not
    arrive at the same time, and cores may have slept. The longer time counts."""

    found = {"wall_seconds": 0.0, "processor_seconds": 0.0}
    if dist.get_rank() < size:
        work = _work_of(kind, group, size, count, device)
        found = _repeated(times, group, device, work)
        if device.type == "cpu":
            product = _a_product(device)
            both = _repeated(times, group, device, product, work)
            less = _repeated(times, group, device, product)
            found = {name: max(found[name], both[name] - less[name]) for name in found}
    dist.barrier()
    everyone = _gathered(found)[:size]
    row: dict[str, Any] = {"kind": kind, "ranks": size, "bytes": count}
    row |= {name: sum(entry[name] for entry in everyone) / size for name in found}
    if kind == "send":  # a message and its reply
        row |= {name: row[name] / 2 for name in found}
    return row


def _repeated(
    times: int, group: Any, device: torch.device, *works: Callable[[], Any]
) -> dict[str, float]:
    """Seconds of one call of each of `works`, in turn (collective over the group)."""
    for work in works:
        work()
    wait_for(device)  # the barrier is gloo's, and does not
    dist.barrier(group)
    begin = Times.now()
    for _ in range(times):
        for work in works:
            work()
    wait_for(device)
    spent = Times.now().since(begin)
    return {name: spent[name] / times for name in ("wall_seconds", "processor_seconds")}


def _a_product(device: torch.device) -> Callable[[], Any]:
    m, k, n = BETWEEN
    a, weight = torch.randn(m, k, device=device), torch.randn(n, k, device=device)
    return lambda: F.linear(a, weight)


def _work_of(kind: str, group: Any, size: int, count: int, device: torch.device) -> Any:
    """The function that runs the collective once."""
    rank, numbers = dist.get_rank(), count // 4
    whole = torch.zeros(numbers, device=device)
    part = torch.zeros(numbers // size, device=device)

    def there_and_back() -> None:
        if rank == 0:
            dist.send(whole, 1, group)
            dist.recv(whole, 1, group)
        else:
            dist.recv(whole, 0, group)
            dist.send(whole, 0, group)

    def to_owners() -> None:
        for owner, own in enumerate(whole.chunk(size)):
            dist.reduce(own, owner, group=group)

    return {
        "reduce": to_owners,
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "send": there_and_back,
    }[kind]


def _gathered(value: dict[str, float]) -> list[dict[str, float]]:
    """The values of all ranks (collective)."""
    everyone: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
