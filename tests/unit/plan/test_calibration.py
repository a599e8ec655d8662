"""A measured device: its derivation from measurements, and the effect of shared cores on predictions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.plan.calibration import Measured, fitted, links_of, predicted_seconds
from megalite.plan.candidates import Candidate, Search
from megalite.plan.device_figures import (
    DEVICES,
    GIB,
    Device,
    Link,
    device_called,
    read_device,
    write_device,
)
from megalite.plan.link_seconds import (
    gather_seconds,
    owners_seconds,
    ring_seconds,
    scatter_seconds,
)
from megalite.plan.plan_program import plan_line
from megalite.plan.search import Planner
from megalite.prove.calibrate import pipe_config, step_configs
from tests.small_models import MODELS

LINK = Link(2e9, 3e-5, gather=1.5, scatter=2.0, reduce=1.2)
ALONE = Link(1e9, 8e-5, gather=1.2, scatter=1.1, reduce=1.4, send=0.5)
MACHINE = Device(
    "mine", 4e10, 8e10, 16 * GIB, 1e10, LINK, LINK, LINK, 0.8, "a test",
    core_share=0.5, launch_seconds=5e-6, layer_seconds=4e-4, micro_seconds=3e-4, step_seconds=4e-3,
    cores=2, alone=ALONE, busy_share=0.75, gather_seconds=2e-4,
    pipe_share=0.9, gradient_rate=3e9, reduce_rate=5e9, states_rate=4e9,
)  # fmt: skip


def product(m: int, k: int, n: int, dtype: str) -> dict[str, Any]:
    rate = MACHINE.single_flops if dtype == "fp32" else MACHINE.half_flops
    seconds = 2.0 * m * k * n / rate + MACHINE.launch_seconds
    return {"dtype": dtype, "m": m, "k": k, "n": n, "seconds": seconds}


def collectives(shared: Link, alone: Link) -> list[dict[str, Any]]:
    """Measurements of collectives. alone: the link of two ranks."""
    rows = []
    for count in (2**12, 2**15, 2**18, 2**21):
        rows.append({
            "kind": "send", "ranks": 2, "bytes": count,
            "seconds": alone.seconds + alone.send * count / alone.bytes_per_second,
        })  # fmt: skip
        for size in (2, 4, 8):
            link = alone if size == 2 else shared
            taken = {
                "all_reduce": ring_seconds(link, size, count, passes=2),
                "all_gather": gather_seconds(link, size, count),
                "reduce_scatter": scatter_seconds(link, size, count),
                "reduce": owners_seconds(link, size, count),
            }
            for kind, seconds in taken.items():
                rows.append({"kind": kind, "ranks": size, "bytes": count, "seconds": seconds})
    return rows


def test_a_device_is_recovered_from_its_own_measurements(tmp_path: Path) -> None:
    sizes = [(16, 32, 32), (64, 128, 128), (512, 512, 512), (512, 512, 1536), (1024, 512, 512)]
    configs, pipe = step_configs(str(tmp_path)), pipe_config(str(tmp_path))
    alone = replace(MACHINE, busy_share=1.0)
    measured = Measured(
        [product(*shape, dtype) for dtype in ("fp32", "bf16") for shape in sizes],
        [{"moved_bytes": 3 * 2**20, "seconds": 3 * 2**20 / MACHINE.memory_rate}],
        [{"dtype": "fp32", "flops": 1e9, "seconds": 1e9 / 4e10}],
        [{"moved_bytes": 7 * 2**20, "seconds": 7 * 2**20 / MACHINE.memory_rate}],
        collectives(LINK, ALONE),
        [{"config": config, "seconds": predicted_seconds(alone, config)} for config in configs],
        MACHINE.busy_share,
        [{"config": pipe, "seconds": predicted_seconds(MACHINE, pipe)}],
    )
    start = replace(MACHINE, half_flops=0.0, single_flops=0.0, core_share=0.1, busy_share=0.1)
    found = fitted(start, measured)
    assert found.alone is not None
    for link, real in ((found.node, LINK), (found.alone, ALONE)):
        assert tuple(vars(link).values()) == pytest.approx(tuple(vars(real).values()), rel=0.01)
    assert found.core_share == pytest.approx(0.5, rel=0.05)
    assert found.product_share == pytest.approx(0.8, rel=0.1)
    assert found.layer_seconds == pytest.approx(4e-4, rel=0.1)
    assert found.gather_seconds == pytest.approx(2e-4, rel=0.05)
    assert found.states_rate == pytest.approx(4e9, rel=0.05)
    assert found.gradient_rate == pytest.approx(3e9, rel=0.05)
    assert found.reduce_rate == pytest.approx(5e9, rel=0.05)
    assert found.pipe_share == pytest.approx(0.9, rel=0.05)
    assert found.step_seconds == pytest.approx(4e-3, rel=0.05)
    for row in measured.steps:
        assert predicted_seconds(found, row["config"]) == pytest.approx(row["seconds"], rel=0.02)


def test_a_link_has_no_negative_seconds() -> None:
    rows = [{**row, "seconds": row["bytes"] / 1e9} for row in collectives(LINK, LINK)]
    assert links_of(rows, 2)[0].seconds == 0.0
    assert links_of(collectives(LINK, LINK), 8)[1] is None, "no two ranks share a core"
    assert links_of(collectives(LINK, LINK), 1)[1] is None, "all do"


def planner(world_size: int, device: Device) -> Planner:
    document = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "megalite": {
            "model": {**MODELS["llama"], "num_hidden_layers": 4, "num_attention_heads": 8},
            "data": {"sequence_length": 64, "train": ["data/train"]},
            "train": {"steps": 1, "run_dir": "runs/x"},
        },
    }
    config = Config.from_dict(document)
    return Planner(Search(config, read_spec(config.model), world_size, 16), device, 80 * GIB)


def test_ranks_that_share_cores_take_their_work_over_the_cores() -> None:
    """Work is conserved: 8 ranks on 2 cores take as long as both cores need for all of it."""
    quick = Link(1e15, 0.0)
    nothing = dict.fromkeys(("layer", "step", "micro"), 0.0)
    seconds = {f"{name}_seconds": value for name, value in nothing.items()}
    device = replace(MACHINE, node=quick, alone=quick, **seconds)
    for pipe in (1, 4):
        one = Candidate(pipe=pipe, zero=1, micro=1)
        shared = planner(8, device).exact(one).time
        own = planner(8, replace(device, cores=8)).exact(one).time
        busy = own.seconds - own.parts["bubble"]
        assert shared.seconds >= 4 * busy * (1 - 1e-9)
        assert shared.seconds - shared.parts["bubble"] == pytest.approx(4 * busy)
        assert planner(8, device).least_seconds(one) <= shared.seconds * (1 + 1e-9)
    two, four = (planner(8, replace(device, cores=n, busy_share=1.0)) for n in (2, 4))
    one = Candidate(zero=1, micro=1)
    assert two.exact(one).time.seconds == pytest.approx(2 * four.exact(one).time.seconds)


def test_cores_that_compute_at_once_are_slower() -> None:
    assert MACHINE.among(1) is MACHINE
    assert MACHINE.among(2).node.seconds == pytest.approx(3e-5 + 5e-5)
    busy = MACHINE.among(8)
    assert busy.node == MACHINE.node
    assert busy.single_flops == 0.75 * MACHINE.single_flops
    assert busy.layer_seconds == MACHINE.layer_seconds / 0.75
    assert DEVICES["H100"].among(8) == DEVICES["H100"] and DEVICES["H100"].ranks_a_core(64) == 1
    assert MACHINE.rank_memory_bytes(4) == MACHINE.memory_bytes / 4
    assert DEVICES["H100"].rank_memory_bytes(4) == DEVICES["H100"].memory_bytes
    assert MACHINE.ranks_a_core(8) == 4 and MACHINE.ranks_a_core(16) == 4  # on two nodes


def test_a_calibration_file_is_a_device_with_additional_data(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    write_device(MACHINE, file, machine={"cores": 2}, measured={"products": []})
    assert read_device(file) == MACHINE
    held = json.loads(file.read_text())
    zeros = {"memory_rate": 0}, {"busy_share": 0}, {"node": {"bytes_per_second": 0, "seconds": 0}}
    for wrong in ({"cores": -1}, {"memory_rate": "fast"}, {"node": {}}, {"more": 1}, *zeros):
        file.write_text(json.dumps({**held, **wrong}))
        with pytest.raises(ConfigError, match=r"^a.key: .*device.json: .*--calibrate") as raised:
            read_device(file, "a.key")
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="none.json: must be a file written by"):
        read_device(tmp_path / "none.json")


def test_gpus_by_their_names() -> None:
    assert device_called("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_called("NVIDIA A100-SXM4-80GB") is DEVICES["A100"]
    assert device_called("AMD Instinct MI300X") is DEVICES["MI300X"]
    assert device_called("NVIDIA H100 PCIe") is None and device_called("NVIDIA H200 NVL") is None
    assert device_called("NVIDIA L40S") is None
    assert device_called("NVIDIA A100-PCIE-40GB") is None


def run_config(tmp_path: Path, **train: Any) -> Config:
    document = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "megalite": {
            "model": {**MODELS["llama"]},
            "data": {"sequence_length": 16, "train": ["data/train"]},
            "train": {"steps": 9, "run_dir": str(tmp_path), **train},
        },
    }
    return Config.from_dict(document).resolve(4)


def test_check_predicts_on_the_calibrated_machine(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    write_device(MACHINE, file)
    assert plan_line(run_config(tmp_path, calibration=str(file))).startswith("plan: on mine ")
    assert plan_line(run_config(tmp_path)).startswith("plan: on H100 ")
    with pytest.raises(ConfigError, match=r"^megalite.train.calibration: no: must be a file"):
        plan_line(run_config(tmp_path, calibration="no"))
