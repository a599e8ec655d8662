"""tools/benchmark_step.py --calibrate and tools/benchmark_plan.py: all figures are present, from real ranks."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest

from megalite.plan.device_figures import MEASURED, read_device
from megalite.prove import machine_rates, ranking
from megalite.prove.benchmark import main as benchmark_main
from megalite.prove.ranking import main
from megalite.prove.step_turns import in_turns
from tests.ranks import run_ranks

SIZES = machine_rates.TimedSizes(
    [(16, 32, 32), (64, 64, 64), (64, 64, 128)], [2**10], [(1, 2, 16, 8)], 2**10, "fp32"
)
LAYOUTS = ["zero=1,micro=4", "data=2,zero=2,micro=1", "pipe=2,zero=1,micro=1"]


def on_rank(rank: int, world_size: int, request: dict[str, Any]) -> Any:
    deepspeed.init_distributed("gloo")
    if "steps" in request:
        return in_turns(request["configs"], request["steps"])
    with (
        mock.patch.object(machine_rates, "CPU", SIZES),
        mock.patch.object(machine_rates, "MESSAGES", {2**12: 2, 2**15: 2}),
        mock.patch.object(machine_rates, "STEPS", 1),
    ):
        return machine_rates.measured(request["what"], request["configs"])


def on_forked_ranks(world_size: int, module: str, arguments: list[str]) -> None:
    """Replaces run_local_ranks, which test_verify.py tests, by ranks that start quickly."""
    request = json.loads(Path(arguments[0]).read_text())
    for rank, result in enumerate(run_ranks(world_size, on_rank, request)):
        (Path(request["folder"]) / f"rank{rank}.json").write_text(json.dumps(result))


@pytest.fixture
def small_document() -> Any:
    whole = ranking.document

    def small(folder: str) -> dict[str, Any]:
        document = whole(folder)
        keys = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        document["megalite"]["model"] |= keys
        document["megalite"]["data"]["sequence_length"] = 16
        return document

    with mock.patch.object(ranking, "document", small):
        yield


def test_a_machine_is_measured_and_predicted_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_document: Any
) -> None:
    file = tmp_path / "device.json"
    with (
        mock.patch("megalite.prove.calibrate.run_local_ranks", on_forked_ranks),
        mock.patch("megalite.prove.calibrate.MOST_RANKS", 4),
    ):
        assert benchmark_main(["--calibrate", str(file)]) == 0
    device, held = read_device(file), json.loads(file.read_text())
    assert device.cores > 0 and device.single_flops > 1e8 and device.node.bytes_per_second > 1e6
    assert 0 < device.busy_share <= 1 and device.product_share > 0
    assert held["machine"]["calibration_seconds"] > 0 and held["machine"]["gpu"] == ""
    rows = held[MEASURED]["collectives"]
    assert {(row["kind"], row["ranks"]) for row in rows} == {
        ("send", 2),
        *(
            (kind, n)
            for kind in ("all_reduce", "reduce_scatter", "all_gather", "reduce")
            for n in (2, 4)
        ),
    }
    for kind in ("products", "pointwise", "attention", "optimizer", "collectives", "steps", "pipe"):
        assert all(row["seconds"] > 0 for row in held[MEASURED][kind]), kind
    assert str(file) in capsys.readouterr().out
    with (
        mock.patch("megalite.prove.ranking.run_local_ranks", on_forked_ranks),
        mock.patch.object(ranking, "LAYOUTS", LAYOUTS),
    ):
        assert main(["--device", str(file), "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "3 layouts by " in out and "Kendall's tau " in out
    assert out.count("| 2 of 2 ranks |") == 2 and out.count("| 1 of 1 ranks |") == 1
    assert "to the byte, in 3 of 3 layouts" in out
