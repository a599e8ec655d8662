"""`megalite.train.epochs` compared with a count by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.checkpoint.files import CheckpointWriter
from megalite.config import load_config
from megalite.config.sections import EarlyStop
from megalite.data.best import Best
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import TrainData
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.plan.plan_program import size_line
from megalite.prove.layouts import Layout, config_of
from megalite.training.pretraining import prepare
from tests.training_runs import document

LENGTHS = [13, 4, 7, 12, 5, 9, 3, 11, 2, 13]
"""Tokens of the documents: 79 in all."""


def config_file(folder: Path, data: dict[str, Any] | None = None, **train: Any) -> Path:
    """A config with batches of 8 samples of 12 tokens, on one rank."""
    with IndexedWriter(folder / "corpus", np.uint16) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add_document(np.full(length, number))
    made = document(folder, "run", {"zero": 0}, train={"steps": None, **train})
    made["megalite"]["data"] |= data or {}
    path = folder / "config.json"
    path.write_text(json.dumps(made))
    return path


PACKED = {"samples": "packed", "reset_attention": True}
PADDED = {"samples": "padded", "reset_attention": True}
RAMP = {"start": 2, "increment": 2, "samples": 12}


@pytest.mark.parametrize(
    ("data", "train", "samples", "steps"),
    [
        # 78 / 12 windows: 6 per epoch.
        ({}, {"epochs": 4}, 6, 3),
        ({}, {"epochs": 1}, 6, 1),
        ({}, {"epochs": 4.5}, 6, 4),
        # 10 documents per epoch, one per sample: 30, or 3.75 batches of 8.
        (PADDED, {"epochs": 3}, 10, 4),
        (PADDED, {"epochs": 0.1}, 10, 1),
        (PADDED, {"epochs": 4}, 10, 5),
        # The first half of the documents.
        ({**PADDED, "train": "half"}, {"epochs": 4}, 5, 3),
        # Positions 12, 12, 11, 10, 8+4, 6+3+2+1: six samples of 12.
        (PACKED, {"epochs": 4}, 6, 3),
        # A ramp of 2, 4, 6 and 8: 2+2 (4 samples: the next level), 4 (8), 6 (14: over), 8, 8, 8: 38 samples in 7 steps.
        (PADDED, {"epochs": 3.8, "batch_ramp": RAMP}, 10, 7),
        (PADDED, {"epochs": 1.4, "batch_ramp": RAMP}, 10, 4),
    ],
)
def test_steps_are_those_of_a_count_by_hand(
    tmp_path: Path, data: dict[str, Any], train: dict[str, Any], samples: int, steps: int
) -> None:
    if data.get("train") == "half":
        data = {**data, "train": [{"path": str(tmp_path / "corpus"), "split": [0, 0.5]}]}
    config = prepare(str(config_file(tmp_path, data, **train)), [], 1).config
    assert config.train.steps == steps and config.train.epochs is None
    wanted = round(train["epochs"] * samples)
    line = f"{samples:,} samples per epoch, {wanted:,} in all: megalite.train.steps {steps}"
    assert config.notes == (f"megalite.train.epochs: {train['epochs']:g}: {line}",)


def test_each_sample_is_taken_as_often_as_there_are_epochs(tmp_path: Path) -> None:
    config = prepare(str(config_file(tmp_path, PADDED, epochs=4)), [], 1).config
    data = TrainData(config.data, config.train.seed, 131)
    consumed = config.batch_plan.consumed(config.train.last_step)
    first = data.batch(range(consumed)).tokens[:, 0]
    assert np.bincount(first).tolist() == [4] * 10


def test_a_run_that_has_begun_counts_the_rest_from_where_it_is(tmp_path: Path) -> None:
    path = config_file(tmp_path, PADDED, epochs=4)
    prepared = prepare(str(path), [], 1)
    state = {"step": 2, "consumed_samples": 16, "consumed_tokens": 192, "seed": 1234}
    folder = tmp_path / "run/checkpoints/step_00000002"
    folder.parent.mkdir(parents=True)
    with CheckpointWriter(folder, prepared.model, state) as writer:
        writer.add("a", torch.zeros(3))
    for overrides, steps in (
        ([], 5),
        (["train_batch_size=4"], 2 + 6),  # 24 samples are left
        (["megalite.train.epochs=6"], 2 + 6),  # 44 in batches of 8
        (["megalite.train.epochs=1"], 2),
    ):
        assert prepare(str(path), overrides, 1).config.train.steps == steps


def test_programs_that_read_no_corpus_do_without_the_steps(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, epochs=3)).resolve(1)
    assert size_line(config, read_spec(config.model)).endswith("parameters; 3 epochs")
    with pytest.raises(ConfigError, match=r"epochs: 3.0: only training reads the corpus"):
        config_of(config, Layout.parse("data=1"), 8)


def test_small_gains_add_up_to_an_improvement() -> None:
    best = Best()
    for step, loss in enumerate([3.0, 2.96, 2.92, 2.88], start=1):
        best = best.after(loss, step, min_delta=0.1)
    assert best == Best(loss=2.88, step=4, bar=2.88, waited=0)
    best = best.after(2.87, 5, 0.1).after(2.86, 6, 0.1)
    assert best == Best(loss=2.86, step=6, bar=2.88, waited=2)
    early = EarlyStop(patience=2)
    assert best.is_stopped(early) and not best.is_stopped(EarlyStop(patience=3))
    assert not best.is_stopped(None)
    line = "stopped early: no lower validation loss in 2 evaluations; best 2.8600 at step 6"
    assert best.stop_line == line
    nothing = Best().after(float("nan"), 1)
    assert nothing.stop_line == "stopped early: no finite validation loss in 1 evaluation"
