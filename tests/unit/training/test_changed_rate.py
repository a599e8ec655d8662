"""The line about a learning rate that a resume changes (megalite/training/changed_rate.py)."""

from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config
from megalite.training.changed_rate import changed_rate
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, train

COSINE = {"type": "cosine", "params": {"warmup_steps": 1}}


def config(folder: Path, steps: int, **keys: Any) -> dict[str, Any]:
    return document(folder, "run", {}, train={"steps": steps}, scheduler=COSINE) | keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps."""
    path = tmp_path_factory.mktemp("run")
    assert run_ranks(1, train, [(config(path, 3), nothing)]) == [[0]]
    return path


def line(folder: Path, document: dict[str, Any]) -> str | None:
    return changed_rate(Config.from_dict(document).resolve(1), rows(folder / "run")[-1])


def test_an_unchanged_schedule_is_no_line(folder: Path) -> None:
    assert line(folder, config(folder, 3)) is None


def test_more_steps_change_the_rate_of_a_cosine(folder: Path) -> None:
    assert line(folder, config(folder, 30)) == (
        "the learning rate of step 3 was 5.00e-03, and is 9.97e-03 by the config of this start "
        "(optimizer.params.lr, scheduler, megalite.train.steps)"
    )
    constant = config(folder, 30, scheduler={"type": "constant", "params": {"warmup_steps": 1}})
    assert (line(folder, constant) or "").startswith("the learning rate of step 3 was 5.00e-03")
