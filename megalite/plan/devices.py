"""Devices and the links between them: what a step's time is predicted with. From data sheets, or measured.

All figures are of one device (one rank). `product_share` is the one number that is fitted, one for each kind of device,
to published runs (published.py): the share of the peak that large matrix products reach in training. No run of H200,
B200 and MI300X was at hand: theirs are H100's, and for MI300X a guess. It is the first thing to measure.
A JSON file of the same figures (`write_device`) takes the place of an entry. Next: step_time.py.
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
    """bytes_per_second: what a rank sends, one way; seconds: that each message of a collective takes beside that."""

    bytes_per_second: float
    seconds: float


@dataclass(frozen=True)
class Device:
    """name; half_flops and single_flops: FLOP/s of dense products in 16 bits and in fp32; memory_bytes: that a
    process can use; memory_rate: bytes a second of its memory; node and network: links within a node and between nodes;
    host: link to main memory; node_ranks: devices of a node; launch_seconds: of one kernel, where it is not hidden by
    the one before; layer_seconds: of a layer's forward beside what its sizes take, and as much again for I and for W;
    micro_seconds and step_seconds: of the engine, for each backward and each step; cores: that all ranks of a
    node share, 0 where each rank has a device of its own; source: where the figures are from."""

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
    micro_seconds: float = 0.0
    step_seconds: float = 0.0
    cores: int = 0

    def flops(self, itemsize: int) -> float:
        """That large products reach, with numbers of so many bytes."""
        return self.product_share * (self.half_flops if itemsize == 2 else self.single_flops)


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


# Memory as the driver has it, in 1e9 bytes. NVLink's and Infinity Fabric's data sheet rates count both directions: here
# one. The network is the one of the makers' own nodes: a 200 Gbit/s adapter for each A100, 400 Gbit/s for the others.
DEVICES = {
    device.name: device
    for device in (
        _accelerator(
            "A100",
            (312, 19.5),
            85.0,
            2039,
            (300, 25, 25),
            0.79,
            "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM), June 2021; NVIDIA DGX A100 data sheet",
        ),
        _accelerator(
            "H100",
            (989.4, 66.9),
            85.0,
            3350,
            (450, 50, 55),
            0.68,
            "NVIDIA H100 Tensor Core GPU data sheet (SXM5); NVIDIA DGX H100 data sheet",
        ),
        _accelerator(
            "H200",
            (989.4, 66.9),
            150.0,
            4800,
            (450, 50, 55),
            0.68,
            "NVIDIA H200 Tensor Core GPU data sheet (SXM); NVIDIA DGX H200 data sheet",
        ),
        _accelerator(
            "B200",
            (2250, 75),
            191.0,
            7700,
            (900, 50, 55),
            0.68,
            "NVIDIA DGX B200 data sheet: 72 PFLOPS in FP8 with sparsity, 1,440 GB, 64 TB/s for 8 GPUs",
        ),
        _accelerator(
            "MI300X",
            (1307.4, 163.4),
            206.0,
            5300,
            (448, 50, 55),
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
            f"--device: {name}: must be one of {names}, or a JSON file of a device (docs/planning.md)"
        )
    return found


def device_of(name: str) -> Device:
    """An entry of the table, or what a JSON file holds."""
    return read_device(Path(name)) if Path(name).is_file() else known_device(name)


def write_device(device: Device, path: Path) -> None:
    """As JSON, which `read_device` reads."""
    path.write_text(json.dumps(asdict(device), indent=2) + "\n", encoding="utf-8")


def read_device(path: Path) -> Device:
    """ConfigError where the file is not one of `write_device`'s."""
    rule = "must be a JSON file of a device (docs/planning.md)"
    with reading(str(path)):
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            links = {name: Link(**held[name]) for name in ("node", "network", "host")}
        except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise ConfigError(f"--device: {path}: {rule}") from error
    if set(held) != {field.name for field in fields(Device)}:
        raise ConfigError(f"--device: {path}: {rule}")
    wrong = [
        name
        for name, value in held.items()
        if name not in (*links, "name", "source")
        and not (isinstance(value, int | float) and value >= 0)
    ]
    if wrong:
        raise ConfigError(f"--device: {path}: {wrong[0]}: {held[wrong[0]]}: {rule}")
    return replace(Device(**{**held, **links}))
