"""Devices and the links between them, from which a step's time is predicted: from data sheets, or measured.

All figures are per device (one rank). `product_share`, the share of the peak that large matrix products reach in
training, is the only fitted number, one for each kind of device, from published runs (published.py). No run was
available for H200, B200 and MI300X: H200 and B200 have H100's value, MI300X's is a guess. It is the first thing to
measure.

A JSON file with the same figures, which `tools/benchmark_step.py --calibrate FILE` measures (calibration.py), replaces
an entry. Next: link_seconds.py.
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
    """bytes_per_second: that a rank sends, one way. seconds: latency of each message of a collective. gather, scatter,
    reduce, send: the time of a byte relative to an all-reduce's, in an all-gather, in a reduce-scatter, in a reduction
    of each part to the rank that owns it, and in a message to one rank."""

    bytes_per_second: float
    seconds: float
    gather: float = 1.0
    scatter: float = 1.0
    reduce: float = 1.0
    send: float = 1.0


ENGINE_RATES = "gradient_rate", "reduce_rate", "states_rate"


@dataclass(frozen=True)
class Device:
    """A device, as seen by one rank.

    half_flops, single_flops: FLOP/s of dense products in 16 bits and in fp32.
    memory_bytes: that a process can use. memory_rate: bytes per second of its memory.
    node, network: links within a node and between nodes. host: link to main memory. node_ranks: devices per node.
    launch_seconds: of one kernel that does not overlap with the previous one.
    layer_seconds: overhead of a layer's forward, and again of its I and of its W.
    gather_seconds: that ZeRO-3's hooks add to a layer's forward, and to its backward.
    micro_seconds, step_seconds: overhead of the engine for each backward and each step.
    gradient_rate: bytes per second at which weight gradients are written to new memory; 0: hidden by the products.
    reduce_rate, states_rate: bytes per second that the engine moves when it reduces gradients, besides sending them,
        and in an update; 0: as memory_rate.
    cores: shared by all ranks of a node, each of which computes on one at a time; 0: each rank has its own device.
    alone: the link within a node if no two ranks share a core, so that a core sleeps while its rank waits; None: node.
    busy_share: the rate of a core while all cores compute, relative to that of one alone.
    pipe_share: the rate of a rank on a pipe axis, which switches micro-batches after each action and may wait for
        them, relative to that of a rank without one."""

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
        """FLOP/s that large products reach, for elements of `itemsize` bytes."""
        return self.product_share * (self.half_flops if itemsize == 2 else self.single_flops)

    def ranks_a_core(self, ranks: int) -> float:
        """Ranks per core in a world of `ranks`, at least 1: once all of them have work, each takes this many times as
        long."""
        return max(1.0, min(ranks, self.node_ranks) / self.cores) if self.cores else 1.0

    def rank_memory_bytes(self, ranks: int) -> float:
        """Memory of a rank in a world of `ranks`: ranks that share cores also share their node's memory."""
        return self.memory_bytes / (min(ranks, self.node_ranks) if self.cores else 1)

    def among(self, ranks: int) -> "Device":
        """The device as seen by one of `ranks` ranks: cores that compute at once share caches, memory and execution
        units, and cores of their own sleep while their rank waits."""
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


LINK_SHARE = 0.8  # share of a link's rate that NCCL's rings reach with large messages
MEMORY_SHARE = 0.8  # share of the memory's rate that memory-bound kernels reach
OVERHEAD_BYTES = 2.5 * GIB  # CUDA's or HIP's context, NCCL's buffers, workspaces of products
FRAGMENTS = 0.03  # share of a device's memory that its allocator cannot use


def _accelerator(
    name: str,
    tflops: tuple[float, float],
    memory_gb: float,
    memory_gb_s: float,
    links_gb_s: tuple[float, float, float],
    product_share: float,
    source: str,
) -> Device:
    """tflops: dense, in 16 bits and in fp32. links_gb_s: one way, to the node, the network and the host."""
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
    """A device by its name. Raises ConfigError, which lists the known names."""
    found = {known.lower(): device for known, device in DEVICES.items()}.get(name.lower())
    if found is None:
        names = ", ".join(DEVICES)
        raise ConfigError(
            f"--device: {name}: must be one of {names}, or a file written by tools/benchmark_step.py --calibrate"
        )
    return found


def device_called(name: str) -> Device | None:
    """A device by the GPU's own name, such as `NVIDIA H100 80GB HBM3`; None if it is not in the table. H100 PCIe and
    NVL have other figures."""
    words = name.upper().replace("-", " ").replace("_", " ").split()
    if "PCIE" in words or "NVL" in words:
        return None
    return next((device for known, device in DEVICES.items() if known in words), None)


def device_of(name: str) -> Device:
    """An entry of the table, or the device in a calibration file."""
    return read_device(Path(name)) if Path(name).is_file() else known_device(name)


MACHINE, MEASURED = "machine", "measured"
"""Further keys of a calibration file: where it was measured, and all measurements."""


def write_device(device: Device, path: Path, **beside: Any) -> None:
    """Writes a device as JSON for `read_device`. beside: MACHINE and MEASURED."""
    path.write_text(json.dumps(asdict(device) | beside, indent=2) + "\n", encoding="utf-8")


def read_device(path: Path, key: str = "--device") -> Device:
    """Reads a file written by `write_device`. Raises ConfigError if it is not one. key: the option that named it."""
    rule = "must be a file written by tools/benchmark_step.py --calibrate (docs/planning.md)"
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
    """Whether a value is valid. Seconds, cores and the engine's rates may be 0; the others are divisors."""
    may_be_zero = name.endswith("seconds") or name in ("cores", *ENGINE_RATES)
    return isinstance(value, int | float) and (value > 0 or (may_be_zero and value == 0))
