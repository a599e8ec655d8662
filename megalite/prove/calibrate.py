"""`tools/benchmark_step.py --calibrate FILE`: measures this machine, and writes the device file that tools/plan.py
--device, `megalite.train.calibration` and the doctor read.

Three starts, about a minute on two cores. First, one rank alone times operations and steps of the real engine. Then
collectives are timed, by one rank per GPU, at most 8, or without GPUs by 8 ranks, however many cores there are. Then,
without GPUs, two ranks with a core each run steps on a pipe axis. Next: ranking.py.
"""

import json
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from megalite.config import Config
from megalite.config.rules import machine_has_gpu
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import ConfigError
from megalite.plan.calibration import Measured, fitted
from megalite.plan.device_figures import (
    MACHINE,
    MEASURED,
    Device,
    Link,
    device_called,
    write_device,
)
from megalite.prove.clocks import QUIET, cores
from megalite.ranks.local import run_local_ranks

RANK_MODULE = "megalite.prove.calibrate_rank"
MOST_RANKS = 8
DOCUMENT_TOKENS = 1000


def calibrate_to(path: Path) -> Device:
    """Measures the machine, writes the file and returns its device. Raises ConfigError if the file cannot be
    written."""
    if path.is_dir():
        raise ConfigError(f"--calibrate: {path}: is a folder; must be a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--calibrate: {path}: {path.absolute().parent}: must be a folder")
    start = time.monotonic()
    device, measured, machine = calibrated()
    machine["calibration_seconds"] = round(time.monotonic() - start, 1)
    write_device(device, path, **{MACHINE: machine, MEASURED: asdict(measured)})
    return device


def device_lines(device: Device, path: Path) -> str:
    """The printed summary of a calibration."""
    shared = f", {100 * device.busy_share:.0f} % of that while all {device.cores} cores compute"
    engine = (
        device.layer_seconds,
        device.micro_seconds,
        device.step_seconds,
        device.gather_seconds,
    )
    layer, micro, step, gather = (f"{1e3 * seconds:.3g} ms" for seconds in engine)
    pipe = f", {100 * device.pipe_share:.0f} % on a pipe axis" * (device.cores > 1)
    links = {"link": device.node}
    if device.alone is not None:
        links = {"link of ranks that share cores": device.node, "link of others": device.alone}
    return "\n".join(
        [
            f"{path}: {device.name}",
            f"    products: {device.single_flops / 1e9:,.4g} GFLOP/s in fp32, {device.half_flops / 1e9:,.4g} in bf16"
            + shared * (device.cores > 1)
            + pipe,
            f"    share of that in a step: {device.product_share:.2f}; in attention's core: {device.core_share:.2f}",
            f"    memory: {device.memory_rate / 1e9:.4g} GB/s; a kernel {1e6 * device.launch_seconds:.3g} µs",
            *(f"    {name}: {_link_line(link)}" for name, link in links.items()),
            f"    the engine: {layer} per layer, {micro} per micro-batch, {step} per step, ZeRO-3 {gather} per layer; "
            f"it writes gradients at {(device.gradient_rate or device.memory_rate) / 1e9:.4g} GB/s, moves "
            f"{(device.reduce_rate or device.memory_rate) / 1e9:.4g} GB/s when it reduces, "
            f"{(device.states_rate or device.memory_rate) / 1e9:.4g} GB/s in an update",
        ]
    )


def _link_line(link: Link) -> str:
    times = {name: getattr(link, name) for name in ("gather", "scatter", "reduce", "send")}
    relative = ", ".join(f"{name} {value:.2f}" for name, value in times.items())
    rate, message = link.bytes_per_second / 1e9, 1e6 * link.seconds
    return f"{rate:.4g} GB/s, {message:.3g} µs per message; time of a byte relative to an all-reduce: {relative}"


def calibrated() -> tuple[Device, Measured, dict[str, Any]]:
    """The device, the measurements that it is fitted to, and the machine."""
    ranks = _gpus() or MOST_RANKS
    with tempfile.TemporaryDirectory(prefix="calibrate_") as folder:
        random_corpus(Path(folder) / "train", vocabulary=512, tokens=200_000)
        configs = step_configs(folder)
        alone = _measured("alone", 1, folder, configs)[0]
        together = _measured("together", ranks, folder)[0] if ranks > 1 else None
        pipe = [] if machine_has_gpu() or cores() == 1 else [_pipe_step(folder)]
    collectives = [] if together is None else with_seconds(together)
    kinds = ("products", "pointwise", "attention", "optimizer", "steps")
    share = 1.0 if together is None else together["busy_share"]
    measured = Measured(
        **{name: alone[name] for name in kinds},
        collectives=collectives,
        busy_share=share,
        pipe=pipe,
    )
    machine = _machine(alone["gpu"], 0.0 if together is None else together["others_share"])
    return fitted(_start(alone), measured), measured, machine


def _gpus() -> int:
    """Number of this machine's GPUs that are used; 0: none."""
    if not machine_has_gpu():
        return 0
    return min(MOST_RANKS, torch.accelerator.device_count())


def _start(alone: dict[str, Any]) -> Device:
    """The device before fitting, with what one node cannot measure: a known GPU's data sheet has it; otherwise links
    between nodes are assumed to be as fast as those within one."""
    known = device_called(alone["gpu"])
    if known is not None:
        return known
    on_cpu = not alone["gpu"]
    link = Link(1e9, 1e-4)
    return Device(
        alone["gpu"] or _processor() or "CPU",
        *(0.0, 0.0),
        alone["memory_bytes"],
        *(1.0, link, link, link, 1.0),
        "tools/benchmark_step.py --calibrate",
        cores=cores() if on_cpu else 0,
    )


def with_seconds(together: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of collectives with the seconds that a rank with its own core takes: wall-clock time, or CPU time if other
    programs used the machine meanwhile."""
    rows = []
    for row in together["collectives"]:
        seconds = row["wall_seconds"]
        if not machine_has_gpu():
            seconds /= max(1.0, row["ranks"] / cores())
            quiet = together["others_share"] <= QUIET
            seconds = max(seconds, row["processor_seconds"]) if quiet else row["processor_seconds"]
        rows.append({**row, "seconds": max(seconds, 1e-9)})
    return rows


def _machine(gpu: str, others: float) -> dict[str, Any]:
    """The machine and software of the measurement."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "gpu": gpu,
        "cores": cores(),
        "torch": torch.__version__,
        "unix_seconds": time.time(),
        "others_share_of_processor_time": round(others, 3),
        "clock_of_collectives": "wall" if gpu or others <= QUIET else "processor",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor())


def _measured(
    what: str, world_size: int, folder: str, configs: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The result of a function of machine_rates.py on each rank."""
    request = Path(folder) / "request.json"
    request.write_text(json.dumps({"what": what, "configs": configs, "folder": folder}))
    run_local_ranks(world_size, RANK_MODULE, [str(request)])
    ranks = range(world_size)
    return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in ranks]


def _pipe_step(folder: str) -> dict[str, Any]:
    """The config of a step on a pipe axis, and the mean seconds that its two ranks compute."""
    config = pipe_config(folder)
    found = _measured("steps", config["megalite"]["parallel"]["pipe"], folder, [config])
    return {"config": config, "seconds": mean(rank["steps"][0]["seconds"] for rank in found)}


def random_corpus(prefix: Path, vocabulary: int, tokens: int) -> None:
    """Writes a corpus of random tokens."""
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(math.ceil(tokens / DOCUMENT_TOKENS)):
            writer.add_document(random.integers(0, vocabulary, DOCUMENT_TOKENS))


def step_configs(folder: str) -> list[dict[str, Any]]:
    """Resolved configs of one rank: four with little to compute, with 1 and 4 layers and micro-batches; the last of
    them with ZeRO-3; one with many weights for its tokens, with 4 micro-batches and ZeRO-2, then ZeRO-1, and with one
    micro-batch; one with many tokens. plan/calibration.py relies on this order."""
    small = [_config(folder, layers, count, 32, 1, 16) for layers in (1, 4) for count in (1, 4)]
    hidden, micro, length = (4096, 2, 2048) if machine_has_gpu() else (256, 4, 128)
    return [
        *small,
        _config(folder, 4, 4, 32, 1, 16, zero=3),
        *(_config(folder, 8, 4, hidden, 1, 16, zero) for zero in (2, 1)),
        _config(folder, 8, 1, hidden, 1, 16),
        _config(folder, 4, 2, hidden, micro, length),
    ]


def pipe_config(folder: str) -> dict[str, Any]:
    """A resolved config of two pipe ranks."""
    return _config(folder, 6, 4, 256, 2, 128, pipe=2)


def _config(
    folder: str,
    layers: int,
    micro_batches: int,
    hidden: int,
    micro: int,
    length: int,
    zero: int = 1,
    pipe: int = 1,
) -> dict[str, Any]:
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": zero, "reduce_bucket_size": 5_000_000},
        "megalite": {
            "model": {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": 11 * hidden // 4,
                "num_hidden_layers": layers,
                "num_attention_heads": max(4, hidden // 128),
                "num_key_value_heads": max(4, hidden // 128),
                "vocab_size": 512,
                "max_position_embeddings": length,
                "tie_word_embeddings": False,
            },
            "parallel": {"pipe": pipe},
            "data": {"sequence_length": length, "train": [f"{folder}/train"]},
            "train": {"steps": 100, "run_dir": f"{folder}/run"},
        },
    }
    if machine_has_gpu():
        document["bf16"] = {"enabled": True}
    return Config.from_dict(document).resolve(pipe).to_json()
