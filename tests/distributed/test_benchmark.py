"""tools/benchmark_step.py: all figures are present, and those with formulas are right."""

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.prove.benchmark import main
from megalite.prove.measure import measure_layout, measure_plain
from tests.ranks import run_ranks
from tests.small_models import MODELS, VOCABULARY
from tests.unit.data.corpora import write_corpus

WITH_KEYS = "tensor=2 megalite.train.activation_checkpointing=full"


def measured(rank: int, world_size: int, request: dict[str, Any]) -> dict[str, Any]:
    deepspeed.init_distributed("gloo")
    return (measure_plain if request["plain"] else measure_layout)(
        Config.from_dict(request["config"]), 2
    )


def on_forked_ranks(world_size: int, module: str, arguments: list[str]) -> None:
    """Replaces run_local_ranks, which test_verify.py tests, by ranks that start quickly."""
    request = json.loads(Path(arguments[0]).read_text())
    for rank, result in enumerate(run_ranks(world_size, measured, request)):
        (Path(request["folder"]) / f"rank{rank}.json").write_text(json.dumps(result))


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    write_corpus(tmp_path / "train", documents=40, vocabulary=VOCABULARY)
    file = tmp_path / "config.json"
    document = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": {**MODELS["llama"], "num_hidden_layers": 2, "tie_word_embeddings": False},
            "data": {"sequence_length": 12, "train": [str(tmp_path / "train")]},
            "train": {"steps": 10, "run_dir": str(tmp_path / "run")},
        },
    }
    file.write_text(json.dumps(document))
    return str(file)


def test_layouts_beside_a_plain_loop(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("megalite.prove.benchmark.run_local_ranks", on_forked_ranks):
        assert (
            main(
                [
                    "--deepspeed_config",
                    config_file,
                    "--steps",
                    "2",
                    "--layouts",
                    "pipe=2",
                    WITH_KEYS,
                ]
            )
            == 0
        )
    out = capsys.readouterr().out
    assert out.count("plain PyTorch, 1 process") == 2
    splits = re.findall(r"share of the step, %: (.*)", out)
    assert len(splits) == 3 and all("products " in line and "loss " in line for line in splits)
    waits = re.findall(r"waited for (\w+), ms per step by rank: (\S+) (\S+)", out)
    assert {axis for axis, *_ in waits} >= {"pipe", "tensor"}
    by_rank = re.findall(r"MB(?: a step)? by rank: (.*)", out)
    assert by_rank and all(len(line.split()) == 2 for line in by_rank)
    (bubbles,) = re.findall(
        r"pipeline bubble, % by rank: (\S+) (\S+); (\S+) on average; simulated (\S+)", out
    )
    *measured, average, simulated = map(float, bubbles)
    assert all(0 < bubble < 100 for bubble in measured) and 0 < simulated < 50
    assert average == pytest.approx(sum(measured) / 2, abs=0.1)
    header, *lines = (re.split(r"  +", line) for line in out.splitlines()[-3:])
    rows = {
        name: dict(
            zip(header[1:], (float(figure.replace(",", "")) for figure in figures), strict=True)
        )
        for name, *figures in lines
    }
    row, other = rows["pipe=2"], rows[WITH_KEYS]
    assert 0 < row["kept MB"] < row["peak MB"]
    assert row["tokens/s"] == pytest.approx(8 * 12 / row["seconds"], rel=0.01)
    assert row["of plain"] > 0 and row["states MB"] > 0
    # Samples × tokens × features × bytes of bf16, over the one boundary.
    hidden = 8 * 12 * 32 * 2 / 1e6
    assert row["pipe MB"] == pytest.approx(hidden, rel=1e-3) and row["tensor MB"] == 0
    assert other["kept MB"] < 0.8 * row["kept MB"]  # the layout's own key
    # 4 all-reduces per layer, plus embedding and head.
    assert other["pipe MB"] == 0 and other["tensor MB"] > 4 * 2 * hidden


def test_a_wrong_argument_is_one_line(config_file: str) -> None:
    with pytest.raises(ConfigError, match="--steps: 0: must be an integer of at least 1"):
        main(["--deepspeed_config", config_file, "--layouts", "pipe=2", "--steps", "0"])
