"""The starting point of a run (megalite/training/start.py), on one rank."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.files import CheckpointWriter, named_best, newest_named, step_name
from megalite.checkpoint.folder import BEST, LATEST
from megalite.errors import CheckpointError
from megalite.training.start import StartingPoint, starting_point
from tests.families import FAMILY_CONFIGS, hf_model

pytestmark = pytest.mark.usefixtures("alone")
MODEL = {"model_type": "llama"}


def save(run_dir: Path, step: int, **state: Any) -> Path:
    folder = run_dir / "checkpoints" / step_name(step)
    folder.parent.mkdir(exist_ok=True)
    values = {"step": step, "consumed_samples": 8 * step, "consumed_tokens": 96 * step, "seed": 1}
    with CheckpointWriter(folder, MODEL, values | state) as writer:
        writer.add("a", torch.full((3,), float(step)))
    return folder


def damage(folder: Path) -> None:
    largest = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def test_an_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    start = starting_point(tmp_path, None)
    assert (start.told, start.position.step, start.weights) == ("a new run", 0, None)
    start.fill(None)  # type: ignore[arg-type]  # for which no engine is needed


def test_the_newest_checkpoint_takes_precedence_over_other_weights(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 7, skipped_steps=2)
    start = starting_point(tmp_path, "none such")
    assert (start.told, start.moments, start.damaged) == ("resuming from step 7", True, ())
    assert (start.position.consumed_samples, start.position.updates) == (56, 5)
    assert start.weights is not None and start.weights.read("a").tolist() == [7.0] * 3
    assert newest_named(tmp_path) == step_name(7)


def test_a_copy_under_another_step_s_name_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the newest it would be loaded at every start, and the steps since then repeated each time."""
    save(tmp_path, 2)
    shutil.copytree(save(tmp_path, 4), tmp_path / "checkpoints" / step_name(9))
    start = starting_point(tmp_path, None)
    assert start.position.step == 4 and start.damaged == (step_name(9),)
    said = capsys.readouterr().err
    assert "step_00000009: is of step 4: must be named step_00000004; looking for an older" in said


def test_a_damaged_checkpoint_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`latest` and `best` named it; they then name the loaded checkpoint and the best one that it knows."""
    save(tmp_path, 2)
    save(tmp_path, 4, best={"loss": 1.5, "step": 2})
    damage(save(tmp_path, 6))
    for pointer in (LATEST, BEST):
        (tmp_path / "checkpoints" / pointer).write_text(step_name(6) + "\n")
    start = starting_point(tmp_path, None)
    assert start.position.step == 4 and start.damaged == (step_name(6),)
    assert newest_named(tmp_path) == step_name(4) and named_best(tmp_path) == step_name(2)
    assert capsys.readouterr().err.endswith("; looking for an older checkpoint\n")


def test_a_missing_best_checkpoint_is_no_longer_named(tmp_path: Path) -> None:
    save(tmp_path, 4, best={"loss": 1.5, "step": 2})
    (tmp_path / "checkpoints" / BEST).write_text(step_name(9) + "\n")
    starting_point(tmp_path, None)
    assert named_best(tmp_path) is None and not (tmp_path / "checkpoints" / BEST).exists()


def test_a_run_without_a_good_checkpoint_does_not_start_over(tmp_path: Path) -> None:
    damage(save(tmp_path, 2))
    damage(save(tmp_path, 4))
    with pytest.raises(CheckpointError, match=step_name(4)):
        starting_point(tmp_path, None)


def test_other_weights_are_a_new_run(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    hf_model(FAMILY_CONFIGS["gpt2"]).save_pretrained(folder)
    start = starting_point(tmp_path / "run", str(folder))
    assert (start.told, start.position.step) == (f"a new run with the weights of {folder}", 0)
    assert not start.moments and not start.partly and start.weights is not None
    with pytest.raises(
        CheckpointError, match="none: does not exist: must be a run folder"
    ) as raised:
        starting_point(tmp_path / "run", str(tmp_path / "none"))
    assert raised.value.agreed, "every rank raises it"


def test_a_classifier_may_start_from_a_language_model(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    hf_model(FAMILY_CONFIGS["gpt2"]).save_pretrained(folder)
    start: StartingPoint = starting_point(tmp_path / "run", str(folder), ("good", "bad"))
    assert start.partly and start.told.endswith(f"{folder} and a new head")
