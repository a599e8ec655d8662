"""Model FLOP utilisation (MFU): the FLOP/s that the model needs for its tokens, over the peak of the devices.

    MFU = tokens_per_second × flops_per_token / peak

flops_per_token is the model's (`TransformerSpec.flops_per_token`): only matrix products, forward and backward once,
without recomputation. peak is the sum over ranks of the dense rate in the device's data sheet, in the run's dtype. For
a CPU, and for a device that is not in the table, it is the rate of large matrix products that all ranks measured at
the same time. Next: speed.py, which adds it to a row; screen.py, which shows it.
"""

import re
import time
from typing import Any

import torch
import torch.distributed as dist

from megalite.parallel.clock import wait_for

# TFLOP/s without sparsity, from the makers' data sheets: (in bf16 or fp16, in fp32 on the units that torch uses by
# default). The first entry that is part of a device's name is used.
DATA_SHEET_TFLOPS: list[tuple[str, float, float | None]] = [
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H200 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H800 PCIe", 756.0, 51.0),
    ("H800", 989.0, 67.0),
    ("H20", 148.0, 44.0),
    ("GH200", 989.0, 67.0),
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A40", 149.7, 37.4),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("V100 PCIE", 112.0, 14.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("MI355X", 2500.0, 157.3),
    ("MI325X", 1307.0, 163.4),
    ("MI300X", 1307.0, 163.4),
    ("MI250X", 191.5, 47.9),  # per die; each of its two dies is a device
]
OTHER_DEVICES = re.compile(r"MIG|Laptop|Max|Ti|SUPER|D|\d+[ABCQ]")
"""A word in the names of devices with other rates than those of the table: parts of a GPU (NVIDIA A10-8Q), and variants
of cards."""
WITHOUT_BF16 = {"V100 PCIE", "V100", "T4"}  # the table has their rate in fp16
MEASURED_SECONDS = 0.1
ROWS = {"cpu": 1024}  # rows and columns of the measured products, by type of device
ROWS_OF_DEVICES = 8192


def data_sheet_flops(name: str, dtype: torch.dtype) -> float | None:
    """Data sheet FLOP/s of a device by its name; None if it is not in the table."""
    words = name.replace("-", " ").replace("_", " ").split()
    if any(OTHER_DEVICES.fullmatch(word) for word in words):
        return None
    for known, half, single in DATA_SHEET_TFLOPS:
        if all(word in words for word in known.split()):
            found = single if dtype == torch.float32 else half
            if found is None or (dtype == torch.bfloat16 and known in WITHOUT_BF16):
                return None
            return 1e12 * found
    return None


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on this rank, queued and waited for once."""
    rows = ROWS.get(device.type, ROWS_OF_DEVICES)
    a, b, room = (torch.randn(rows, rows, dtype=dtype, device=device) for _ in range(3))
    count, seconds = 1, 0.0
    while seconds < MEASURED_SECONDS:
        torch.mm(a, b, out=room)  # warm-up
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=room)
        wait_for(device)
        seconds, count = time.perf_counter() - start, 2 * count
    return 2.0 * rows**3 * (count // 2) / seconds


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of all ranks together (collective)."""
    known = None
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        known = data_sheet_flops(module.get_device_name(device), dtype)
    if dist.is_initialized():
        dist.barrier()  # so that all ranks measure at once and share the machine as in the run
    own = known if known is not None else measured_flops(device, dtype)
    total = torch.tensor(own, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


class Utilisation:
    """Figures of a step from its tokens per second. flops_per_token: of the model. peak: FLOP/s of all ranks."""

    def __init__(self, flops_per_token: float, peak: float, ranks: int) -> None:
        self.flops_per_token, self.peak, self.ranks = flops_per_token, peak, ranks

    def row(self, tokens_per_second: float) -> dict[str, float]:
        """Fields of the step's row of metrics: the model's TFLOP/s on a rank, and MFU as a share of 1."""
        flops = tokens_per_second * self.flops_per_token
        return {"tflops_per_rank": flops / self.ranks / 1e12, "mfu": flops / self.peak}
