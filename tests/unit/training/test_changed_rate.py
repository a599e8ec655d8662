"""The line about a learning rate that a resume changes (megalite/training/changed_rate.py)."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megalite.config import Config
from megalite.training.changed_rate import changed_rate
from megalite.training.loop import Run
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
        "the learning rate of step 3 was 5.000e-03; this start's config gives 9.971e-03 for it (see "
        "optimizer.params.lr, scheduler, megalite.train.steps)"
    )
    constant = config(folder, 30, scheduler={"type": "constant", "params": {"warmup_steps": 1}})
    assert (line(folder, constant) or "").startswith("the learning rate of step 3 was 5.000e-03")


def test_another_batch_alone_is_no_line(tmp_path: Path) -> None:
    """A warm-up by tokens depends on the tokens that the run has consumed, whatever its batch was then."""
    warmup = {"type": "constant", "params": {"warmup_tokens": 1000}}
    made = document(tmp_path, "run", {}, train={"steps": 3}, scheduler=warmup)
    assert run_ranks(1, train, [(made, nothing)]) == [[0]]
    assert line(tmp_path, made) is None
    (*_, last) = rows(tmp_path / "run")
    larger = Config.from_dict(made | {"train_batch_size": 16}).resolve(1)
    before, step_tokens = last["consumed_tokens"] - 8 * 12, 16 * 12
    wanted = 1e-2 * (before + 8 * 12) / 1000
    assert last["learning_rate"] == pytest.approx(wanted)
    found = changed_rate(larger, last)
    assert found is None, (found, step_tokens)


def logged(folder: Path, rank: int) -> contextlib.AbstractContextManager[Any]:
    """Adds the lines of a run's log to a file."""

    def log(self: Run, text: str) -> None:
        with (folder / "log").open("a") as file:
            file.write(f"{text}\n")

    return mock.patch.object(Run, "log", log)


def test_a_resume_says_it_once(folder: Path) -> None:
    longer = config(folder, 6)
    assert run_ranks(1, train, [(longer, partial(logged, folder))]) == [[0]]
    lines = (folder / "log").read_text().splitlines()
    assert sum(text.startswith("the learning rate of step 3 was") for text in lines) == 1
