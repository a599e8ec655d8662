"""The machine of a measurement, in one line."""

import importlib.metadata
import os
from pathlib import Path


def machine_line() -> str:
    """CPU, cores, load and the libraries' versions."""
    names = [
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "deepspeed", "transformers")
    ]
    load = os.getloadavg()[0]
    kind = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'unknown'} ({' '.join(kinds)})"
    return ", ".join([kind, f"load {load:.1f}", *versions])


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
