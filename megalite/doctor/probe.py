"""Facts about one host, as a JSON object on standard output.

    python -m megalite.doctor.probe '{"paths": [FILE, …], "folders": [FOLDER, …], "port": 29500}'

Imports neither torch nor deepspeed, so that a host on which they are broken answers too. Next: findings.py.
"""

import glob
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import megalite
from megalite.doctor.gpus import facts

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
# Hashed at the start of a file; with size and time this identifies a file.
HASHED_BYTES = 2**20


def probe(wanted: dict[str, Any]) -> dict[str, Any]:
    """The facts; memory and disks in bytes, time in seconds."""
    gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    return {
        "name": socket.gethostname(),
        "versions": {"Python": platform.python_version(), "megalite": _sources()}
        | {p: _version(p) for p in PACKAGES},
        "files": {path: _file(Path(path)) for path in wanted["paths"]},
        "port_free": wanted["port"] is None or _is_free(wanted["port"]),
        "memory": _available_memory(),
        "disks": {folder: _free_disk(Path(folder)) for folder in wanted["folders"]},
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "gpu_facts": facts() if gpus else [],
        "time": time.time(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _sources() -> str:
    """A hash of megalite's source files, which may be installed or a checkout."""
    root, total = Path(megalite.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _file(path: Path) -> list[Any] | None:
    """[bytes, modification time, hash of the start]; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            return [
                stat.st_size,
                int(stat.st_mtime),
                hashlib.sha256(file.read(HASHED_BYTES)).hexdigest()[:12],
            ]
    except OSError:
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _free_disk(folder: Path) -> int:
    """Free bytes of the folder's file system; 0 if it is not writable."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free if os.access(existing, os.W_OK) else 0


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))), flush=True)
