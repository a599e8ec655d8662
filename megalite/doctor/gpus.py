"""Facts about a host's GPUs from nvidia-smi, and findings about them. Used by probe.py and findings.py."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "total": "memory.total",
    "used": "memory.used",
    "errors": "ecc.errors.uncorrected.volatile.total",
}
"""Our names and nvidia-smi's; memory in MiB."""
SECONDS = 30.0  # a broken driver may never answer
LEAST_USED = 1024  # MiB used on a GPU that suggest another process; a driver uses some hundreds
GPU = dict[str, str]


def facts() -> list[GPU] | str:
    """Facts about this host's GPUs by `FIELDS`, in order; or why nvidia-smi gives none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "nvidia-smi not found"
    query = [program, f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return f"nvidia-smi: {said[0] if said else f'exit code {done.returncode}'}"
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS)]


def line(gpus: list[GPU]) -> str:
    """`8 × NVIDIA H100 80GB HBM3, 81559 MiB, driver 550.54.15`, and so on for other kinds."""
    kinds = [f"{gpu['name']}, {gpu['total']} MiB, driver {gpu['driver']}" for gpu in gpus]
    return "; ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))


def gpu_findings(host: str, seen: Any, first: str, reference: Any) -> Iterator[str]:
    """Findings about a host's GPUs. seen, reference: `facts` of the host and of the first one."""
    if isinstance(seen, str):
        yield f"{host}: {seen}: check the driver of its GPUs"
        return
    if isinstance(reference, list) and line(seen) != line(reference):
        yield f"{host}: {line(seen)}; on {first} {line(reference)}: a step is as fast as the slowest GPU"
    for number, gpu in enumerate(seen):
        if gpu["errors"].isdecimal() and int(gpu["errors"]):
            yield f"{host}: GPU {number}: {gpu['errors']} uncorrected memory errors: reset or replace it"
        if gpu["used"].isdecimal() and int(gpu["used"]) >= LEAST_USED:
            yield f"{host}: GPU {number}: {gpu['used']} MiB are in use: end the process that holds them"
