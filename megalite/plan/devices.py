"""Devices and the links between them: what a step's time is predicted with. From data sheets, or measured.

All figures are of one device (one rank). `product_share` is the one number that is fitted, one for each kind of device,
to published runs (published.py): the share of the peak that large matrix products reach in training. No run of H200,
B200 and MI300X was at hand: theirs are H100's, and for MI300X a guess. It is the first thing to measure.
A JSON file of the same figures, which `tools/benchmark_step.py --calibrate FILE` measures (calibration.py), takes the
place of an entry. Next: link_seconds.py.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError
from megalite.inputs import reading

GIGA, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Link:
    """bytes_per_second: what a rank sends, one way; seconds: that each message of a collective takes beside that.
    gather, scatter, reduce, send: how many times as long a byte takes in an all-gather, reduce-scatter, in a reduction
    of each part to the rank that owns it, and in a message to one rank, as in an all-reduce."""

    bytes_per_second: float
    seconds: float
    gather: float = 1.0
    scatter: float = 1.0
    reduce: float = 1.0
    send: float = 1.0


ENGINE_RATES = "gradient_rate", "reduce_rate", "states_rate"


@dataclass(frozen=True)
class Device:
    """name; half_flops and single_flops: FLOP/s of dense products in 16 bits and in fp32; memory_bytes: that a
    process can use; memory_rate: bytes a second of its memory; node and network: links within a node and between nodes;
    host: link to main memory; node_ranks: devices of a node; launch_seconds: of one kernel, where it is not hidden by
    the one before; layer_seconds: of a layer's forward beside what its sizes take, and as much again for I and for W;
    gather_seconds: that ZeRO-3's hooks add to a layer's forward, and to its backward; micro_seconds and step_seconds:
    of the engine, for each backward and each step; gradient_rate: bytes a second at which gradients of weights are
    written to new memory, 0: their products hide it; reduce_rate, states_rate: bytes a second that the engine moves
    where it reduces gradients, beside sending them, and in an update, 0: as memory_rate;
    cores: that all ranks of a node share, a rank computing on one at a time, 0 where each rank has a device of its own;
    alone: the link within a node where no two ranks share a core, which sleeps while its rank waits, None: as node;
    busy_share: a core's rate while all cores compute, over that of one alone; pipe_share: a rank's rate on a pipe axis,
    where it turns to another micro-batch after each action and may wait for it, over that of a rank that does not;
    source: where the figures are from."""

    name: str
    half_flops: float
    single_flops: float
    memory_bytes: float
    memory_rate: float
    node: Link
    network: Link
    host: Link
    product_share: float
    source: str
    core_share: float = 0.6
    node_ranks: int = 8
    launch_seconds: float = 4e-6
    layer_seconds: float = 0.0
    gather_seconds: float = 0.0
    micro_seconds: float = 0.0
    step_seconds: float = 0.0
    gradient_rate: float = 0.0
    reduce_rate: float = 0.0
    states_rate: float = 0.0
    cores: int = 0
    alone: Link | None = None
    busy_share: float = 1.0
    pipe_share: float = 1.0

    def flops(self, itemsize: int) -> float:
        """That large products reach, with numbers of so many bytes."""
        return self.product_share * (self.half_flops if itemsize == 2 else self.single_flops)

    def ranks_a_core(self, ranks: int) -> float:
        """Of a world of so many, at least 1: work is conserved, so what a rank does takes so many times as long once
        all of them have work."""
        return max(1.0, min(ranks, self.node_ranks) / self.cores) if self.cores else 1.0

    def rank_memory_bytes(self, ranks: int) -> float:
        """Of a world of so many: ranks that share cores share their node's memory too."""
        return self.memory_bytes / (min(ranks, self.node_ranks) if self.cores else 1)

    def among(self, ranks: int) -> "Device":
        """As one of so many ranks finds it: cores that compute at once share caches, memory and execution units, and
        those that nobody else wants sleep."""
        ranks = min(ranks, self.node_ranks)
        working = min(ranks, self.cores)
        if working <= 1:
            return self
        node = self.node
        if ranks <= self.cores and self.alone is not None:
            node = self.alone
        share = 1 - (1 - self.busy_share) * (working - 1) / (self.cores - 1)
        rates = ("half_flops", "single_flops", "memory_rate", *ENGINE_RATES)
        seconds = ("launch", "layer", "gather", "micro", "step")
        slower = {name: getattr(self, name) * share for name in rates}
        slower |= {f"{name}_seconds": getattr(self, f"{name}_seconds") / share for name in seconds}
        return replace(self, node=node, **slower)


LINK_SHARE = 0.8  # of a link's rate that NCCL's rings reach with large messages
MEMORY_SHARE = 0.8  # of a memory's rate that kernels reach which do nothing else
OVERHEAD_BYTES = 2.5 * GIB  # CUDA's or HIP's context, NCCL's buffers, workspaces of products
FRAGMENTS = 0.03  # of a device's memory that its allocator cannot use


def _accelerator(
    name: str,
    tflops: tuple[float, float],
    memory_gb: float,
    memory_gb_s: float,
    links_gb_s: tuple[float, float, float],
    product_share: float,
    source: str,
) -> Device:
    """tflops: in 16 bits without sparsity, in fp32; links_gb_s: one way to the node, the network, the host."""
    node, network, host = (GIGA * LINK_SHARE * rate for rate in links_gb_s)
    return Device(
        name,
        1e12 * tflops[0],
        1e12 * tflops[1],
        GIGA * memory_gb,
        GIGA * MEMORY_SHARE * memory_gb_s,
        Link(node, 5e-6),
        Link(network, 12e-6),
        Link(host, 10e-6),
        product_share,
        source,
    )


# Memory as torch reports it (total_memory), in 1e9 bytes: 80 GiB of A100 and H100, 141 GB of H200, 180 GB of B200 and
# 192 GiB of MI300X less what the driver keeps. Dense rates: data sheets print twice as much, with sparsity, for Hopper
# and Blackwell. NVLink's and Infinity Fabric's data sheet rates count both directions (600, 900, 1,800 GB/s; 7 links of
# 128 GB/s): here one. The network is the one of the makers' own nodes: a 200 Gbit/s adapter for each A100, 400 Gbit/s
# for the others. The host's link is PCIe with 16 lanes, generation 4 of A100 and 5 of the others.
DEVICES = {
    device.name: device
    for device in (
        _accelerator(
            "A100",
            (312, 19.5),
            85.0,
            2039,
            (300, 25, 32),
            0.79,
            "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM), June 2021; NVIDIA DGX A100 data sheet",
        ),
        _accelerator(
            "H100",
            (989.4, 66.9),
            85.0,
            3350,
            (450, 50, 64),
            0.68,
            "NVIDIA H100 Tensor Core GPU data sheet (SXM5); NVIDIA DGX H100 data sheet",
        ),
        _accelerator(
            "H200",
            (989.4, 66.9),
            150.0,
            4800,
            (450, 50, 64),
            0.68,
            "NVIDIA H200 Tensor Core GPU data sheet (SXM); NVIDIA DGX H200 data sheet",
        ),
        _accelerator(
            "B200",
            (2250, 75),
            191.0,
            8000,
            (900, 50, 64),
            0.68,
            "NVIDIA DGX B200 data sheet: 72 PFLOPS in FP8 with sparsity, 1,440 GB, 64 TB/s, NVLink 14.4 TB/s",
        ),
        _accelerator(
            "MI300X",
            (1307.4, 163.4),
            206.0,
            5300,
            (448, 50, 64),
            0.55,
            "AMD Instinct MI300X data sheet: 7 Infinity Fabric links of 128 GB/s; 8-GPU platform data sheet",
        ),
    )
}


def known_device(name: str) -> Device:
    """By its name. ConfigError lists those that are known."""
    found = {known.lower(): device for known, device in DEVICES.items()}.get(name.lower())
    if found is None:
        names = ", ".join(DEVICES)
        raise ConfigError(
            f"--device: {name}: must be one of {names}, or a file of tools/benchmark_step.py --calibrate"
        )
    return found


def device_called(name: str) -> Device | None:
    """By a GPU's own name, such as `NVIDIA H100 80GB HBM3`; None where it is not in the table: H100 PCIe and NVL have
    other figures."""
    words = name.upper().replace("-", " ").replace("_", " ").split()
    if "PCIE" in words or "NVL" in words:
        return None
    return next((device for known, device in DEVICES.items() if known in words), None)


def device_of(name: str) -> Device:
    """An entry of the table, or what a file of a calibration holds."""
    return read_device(Path(name)) if Path(name).is_file() else known_device(name)


MACHINE, MEASURED = "machine", "measured"
"""What a calibration's file holds beside the device: where it was measured, and each figure that it follows from."""


def write_device(device: Device, path: Path, **beside: Any) -> None:
    """As JSON, which `read_device` reads. beside: MACHINE and MEASURED."""
    path.write_text(json.dumps(asdict(device) | beside, indent=2) + "\n", encoding="utf-8")


def read_device(path: Path, key: str = "--device") -> Device:
    """ConfigError where the file is not one of `write_device`'s. key: that named it."""
    rule = "must be a file of tools/benchmark_step.py --calibrate (docs/planning.md)"
    with reading(str(path)):
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            links = {
                name: Link(**held[name])
                for name in LINKS
                if name != "alone" or held[name] is not None
            }
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{key}: {path}: {rule}") from error
    for name in (MACHINE, MEASURED):
        held.pop(name, None)
    if set(held) != {field.name for field in fields(Device)}:
        raise ConfigError(f"{key}: {path}: {rule}")
    numbers = {name: value for name, value in held.items() if name not in _NOT_NUMBERS}
    for name, link in links.items():
        numbers |= {f"{name}.{part}": value for part, value in vars(link).items()}
    wrong = [name for name, value in numbers.items() if not _is_figure(name, value)]
    if wrong:
        raise ConfigError(f"{key}: {path}: {wrong[0]}: {numbers[wrong[0]]}: {rule}")
    return replace(Device(**{**held, **links}))


LINKS = ("node", "network", "host", "alone")
_NOT_NUMBERS = ("name", "source", *LINKS)


def _is_figure(name: str, value: Any) -> bool:
    """Seconds, cores and rates of the engine may be 0; something is divided by the others."""
    may_be_zero = name.endswith("seconds") or name in ("cores", *ENGINE_RATES)
    return isinstance(value, int | float) and (value > 0 or (may_be_zero and value == 0))
