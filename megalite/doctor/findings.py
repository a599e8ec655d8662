"""Problems and differences between hosts, one line each that says what to do. Pure functions of the probes
(probe.py)."""

from collections.abc import Iterator
from typing import Any

from megalite.doctor.gpus import gpu_findings

CLOCK_SECONDS = 2.0
# Memory per rank: torch, DeepSpeed and buffers take about 0.5 GiB without a model.
RANK_BYTES = 2**30
GIB = 2**30


def findings(
    probes: dict[str, dict[str, Any]], slots: dict[str, int], port: int, checkpoint_bytes: int
) -> Iterator[str]:
    """The findings. probes: by host, the first host's first, each with `clock_error`, the least seconds by which its
    clock is ahead of this one's. checkpoint_bytes: of the run's checkpoints; 0 if not known."""
    first, reference = next(iter(probes.items()))
    if not reference["port_free"]:
        yield f"{first}: port {port} is in use: choose another one with --master_port N"
    for host, seen in probes.items():
        for name, version in seen["versions"].items():
            if version == "none":
                yield f"{host}: {name} is not installed for this Python: install it, in the same place on every host"
            elif version != reference["versions"][name] != "none":
                wanted = reference["versions"][name]
                yield f"{host}: {name} is {version}, on {first} {wanted}: install the same on every host"
        yield from _file_findings(host, seen, first, reference)
        yield from _room_findings(host, seen, slots[host], checkpoint_bytes)
        yield from gpu_findings(host, seen["gpu_facts"], first, reference["gpu_facts"])
        if seen["clock_error"]:
            error = seen["clock_error"]
            yield f"{host}: its clock is off by at least {error:+.1f} s: start chrony or ntpd: goodput and logs use it"


def _file_findings(
    host: str, seen: dict[str, Any], first: str, reference: dict[str, Any]
) -> Iterator[str]:
    for path, facts in seen["files"].items():
        wanted = reference["files"][path]
        if facts is None:
            yield f"{host}: {path}: cannot be read: put it on a file system that every host mounts, or copy it"
        elif wanted is not None and facts != wanted:
            names = ("size", "modification time", "content")
            what = ", ".join(
                name for name, a, b in zip(names, facts, wanted, strict=True) if a != b
            )
            yield f"{host}: {path}: other {what} than on {first}: copy it again, with rsync -a"


def _room_findings(
    host: str, seen: dict[str, Any], slots: int, checkpoint_bytes: int
) -> Iterator[str]:
    if seen["memory"] < slots * RANK_BYTES:
        free = f"{seen['memory'] / GIB:.1f} GiB"
        yield f"{host}: {free} of memory are free for {slots} ranks: less than 1 GiB each: free some, or lower slots"
    if seen["gpus"] and slots > seen["gpus"]:
        count = "1 GPU" if seen["gpus"] == 1 else f"{seen['gpus']} GPUs"
        yield f"{host}: slots={slots}: it has {count}: each rank needs one"
    for folder, free in seen["disks"].items():
        if free < checkpoint_bytes:
            yield (
                f"{host}: {folder}: {free / GIB:.1f} GiB are free, or it is not writable: checkpoints need "
                f"{checkpoint_bytes / GIB:.1f} GiB: free space, or lower megalite.train.keep_checkpoints"
            )
