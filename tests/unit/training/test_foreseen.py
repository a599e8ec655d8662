"""Predictions printed with a run's first steps (megalite/training/foreseen.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config import load_config
from megalite.model.families import read_spec
from megalite.plan.candidates import Search, given_candidate
from megalite.plan.device_figures import DEVICES, GIB, write_device
from megalite.plan.search import Planner
from megalite.training import foreseen
from megalite.training.foreseen import Foreseen, device_of_run
from tests.ranks import REPOSITORY
from tests.unit.plan.test_calibration import MACHINE, run_config


def test_time_is_predicted_for_a_known_machine(tmp_path: Path) -> None:
    file, cpu = tmp_path / "device.json", torch.device("cpu")
    write_device(MACHINE, file)
    config, threads = run_config(tmp_path, calibration=str(file)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = device_of_run(config, cpu, ["a", "a", "b"])
        assert found == replace(MACHINE, node_ranks=2)
        search = Search(config, read_spec(config.model), 4, 8)
        layout = Planner(search, found, 80 * GIB).layout(config, given_candidate(config))
        assert foreseen.predicted_seconds(config, found) == pytest.approx(layout.time.seconds)
        torch.set_num_threads(2)
        assert device_of_run(config, cpu, ["a"]) is None
    finally:
        torch.set_num_threads(threads)
    assert device_of_run(run_config(tmp_path), cpu, ["a"]) is None
    ramp = {"start": 4, "increment": 4, "samples": 8}
    assert foreseen.predicted_seconds(run_config(tmp_path, batch_ramp=ramp), MACHINE) is None
    shipped = load_config(REPOSITORY / "ds_configs/t5.json").resolve(8)
    assert foreseen.predicted_seconds(shipped, DEVICES["H100"]) is None, "times are not known"


def step_row(step: int, **fields: Any) -> dict[str, Any]:
    return {"step": step, "step_seconds": 0.1 * step, **fields}


def test_first_steps_have_predicted_beside_measured() -> None:
    memory = [
        {"weights_bytes": 10, "gradients_bytes": 5, "optimizer_bytes": 20, "activations_bytes": 7},
        {"weights_bytes": 11, "gradients_bytes": 5, "optimizer_bytes": 20, "activations_bytes": 7},
    ]
    held = {"weights_bytes": [10, 11], "gradients_bytes": [5, 5], "optimizer_bytes": [20, 20]}
    said: list[str] = []
    watcher = Foreseen(memory, 0.25, said.append)
    rows = [step_row(5, **held), *(step_row(step) for step in range(6, 11))]
    for row in rows:
        watcher.after_step(row)
    assert rows[0]["predicted_states_bytes"] == [35, 36]
    assert [row.get("predicted_step_seconds") for row in rows] == [
        None,
        0.25,
        0.25,
        0.25,
        None,
        None,
    ]
    assert said == [
        "step time: predicted 0.25 s, measured 0.7 s (+180 %, median of steps 6 to 8); "
        "model states of up to 36 bytes per rank, as predicted"
    ]
    said.clear()
    other = {**held, "optimizer_bytes": [20, 24]}
    Foreseen(memory, None, said.append).after_step(step_row(1, **other))
    assert said == ["model states of rank 1: predicted 36 bytes, measured 40 bytes"]
