"""With which changes a run may be resumed, and which would make it a different run: reported in one line, before ranks
start."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megalite.checkpoint.files import Checkpoint, CheckpointWriter, find_checkpoint
from megalite.data.indexed import files_of
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import CheckpointError, ConfigError
from megalite.training.fingerprint import IDS, fingerprint
from megalite.training.lock import Holder
from megalite.training.pretraining import _train, main, prepare
from tests.ranks import run_ranks
from tests.training_runs import LENGTH, VOCABULARY, document, rows
from tests.unit.data.corpora import write_corpus

STEPS = 6


def config_file(folder: Path, **data: Any) -> Path:
    """Of a blend of two corpora, in `folder/run`."""
    made = document(
        folder, "run", {}, train={"steps": STEPS, "checkpoint_interval": 2, "keep_checkpoints": 0}
    )
    for name, seed in (("other", 1), ("third", 2)):
        if not (folder / f"{name}.idx").exists():
            write_corpus(folder / name, 60, vocabulary=VOCABULARY, seed=seed)
    corpora = [
        {"path": str(folder / "corpus"), "weight": 0.5, "split": [0, 0.9]},
        str(folder / "other"),
    ]
    made["megalite"]["data"] |= {"train": corpora} | data
    path = folder / "config.json"
    path.write_text(json.dumps(made))
    return path


def trained(path: Path, step: int = 2, without: str = "") -> Path:
    """A checkpoint like one of a run of that config, except its weights and a part of its fingerprint."""
    prepared = prepare(str(path), [], 2)
    told = fingerprint(prepared.config)
    told.pop(without, None)
    state = {
        "step": step,
        "consumed_samples": 8 * step,
        "consumed_tokens": 8 * step * LENGTH,
        "seed": 1234,
    }
    state |= {"optimizer": "AdamW", "fingerprint": told}
    folder = path.parent / "run" / "checkpoints" / f"step_{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(folder, prepared.model, state) as writer:
        writer.add("a", torch.zeros(3))
    return folder


def as_json(*corpora: Any) -> str:
    return f"megalite.data.train={json.dumps(corpora)}"


def test_what_positions_do_not_depend_on_may_change(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    trained(path)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    for file in (*files_of(tmp_path / "corpus"), *files_of(tmp_path / "other")):
        shutil.copy(file, tmp_path / f"copy_of_{file.name}")
    corpus, other = (str(tmp_path / f"copy_of_{name}") for name in ("corpus", "other"))
    moved = as_json({"path": corpus, "weight": 3, "split": [0, 0.9]}, {"path": other, "weight": 6})
    for overrides in (
        ["megalite.train.steps=100"],
        ["train_batch_size=4", "train_micro_batch_size_per_gpu=1"],
        ["zero_optimization.stage=3"],
        ["megalite.parallel.tensor=2"],
        [f"megalite.train.run_dir={tmp_path}/moved"],
        [moved],
        ["megalite.data.loss=all"],
        [f'megalite.data.valid=["{corpus}"]'],
        ["optimizer.params.lr=0.1"],
    ):
        prepare(str(path), overrides, 2)


def test_what_positions_depend_on_is_named_with_both_values(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    folder = trained(path)
    corpus, other = (
        {"path": str(tmp_path / "corpus"), "weight": 0.5, "split": [0, 0.9]},
        str(tmp_path / "other"),
    )
    rule = f"as in {folder}: another needs a new run, with megalite.train.load"
    for override, line in {
        "megalite.data.sequence_length=16": "megalite.data.sequence_length: 16: must be 12, ",
        "megalite.data.samples=padded": 'megalite.data.samples: "padded": must be "windows", ',
        "megalite.data.order=megatron": 'megalite.data.order: "megatron": must be "shuffled", ',
        "megalite.data.reset_attention=true": "megalite.data.reset_attention: true: must be false, ",
        "megalite.train.seed=5": "megalite.train.seed: 5: must be 1234, ",
        as_json(
            {**corpus, "split": [0, 1]}, other
        ): "megalite.data.train.0.split: [0.0, 1.0]: must be [0.0, 0.9], ",
        as_json(
            {**corpus, "weight": 1.5}, other
        ): "megalite.data.train.0.weight: 0.6 of all: must be 0.33",
        as_json(corpus): "megalite.data.train: 1 corpora: must be 2, ",
        as_json(corpus, str(tmp_path / "third")): f"megalite.data.train.1.path: {tmp_path}/third: ",
        as_json(
            {**corpus, "path": other}, corpus["path"]
        ): f"megalite.data.train.0.path: {other}: ",
    }.items():
        with pytest.raises(CheckpointError) as raised:
            prepare(str(path), [override], 2)
        assert str(raised.value).startswith(line) and rule in str(raised.value), raised.value


@pytest.mark.parametrize("change", ["another length", "other tokens", "another order of documents"])
def test_another_corpus_under_the_same_name_is_found(tmp_path: Path, change: str) -> None:
    lengths = [37, 41, 41, 60] * 30
    random = np.random.default_rng(3)
    documents = [random.integers(0, VOCABULARY, length) for length in lengths]

    def write(folder: Path) -> None:
        for file in folder.glob("other.*"):
            file.unlink()
        with IndexedWriter(folder / "other", np.uint16) as writer:
            for one in documents:
                writer.add_document(one)

    write(tmp_path)
    path = config_file(tmp_path)
    trained(path)
    write(tmp_path)
    prepare(str(path), [], 2)  # the same, written again
    if change == "another length":
        documents[50] = documents[50][:-1]
    elif change == "other tokens":
        documents = [(one + 1) % VOCABULARY for one in documents]
    else:
        documents[0], documents[3] = documents[3], documents[0]
    write(tmp_path)
    with pytest.raises(
        CheckpointError,
        match="megalite.data.train.1.path: .*/other: holds .*: must be the corpus of ",
    ):
        prepare(str(path), [], 2)


def test_check_looks_at_a_run_that_is_going_on(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    trained(path)
    lock = tmp_path / "run" / "lock"
    lock.write_text(json.dumps(asdict(Holder.this(tmp_path / "run"))))
    before = lock.read_text()
    assert main([f"--deepspeed_config={path}", "--check", "--world-size=2"]) == 0
    assert lock.read_text() == before and sorted(os.listdir(tmp_path / "run")) == [
        "checkpoints",
        "lock",
    ]


def test_a_checkpoint_without_a_fingerprint_resumes(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    folder.parent.mkdir(parents=True)
    state = {"step": 1, "consumed_samples": 8, "consumed_tokens": 96, "seed": 1234}
    with CheckpointWriter(folder, prepare(str(path), [], 2).model, state) as writer:
        writer.add("a", torch.zeros(3))
    prepare(str(path), ["megalite.data.sequence_length=16"], 2)


def test_another_tokenizer_s_end_of_document_is_named(tmp_path: Path) -> None:
    """Older checkpoints without such ids are accepted."""
    names = {f"word{number}": number for number in range(9)}
    for end in ("word0", "word1"):
        model = Tokenizer(models.WordLevel(names, "word8"))
        PreTrainedTokenizerFast(tokenizer_object=model, eos_token=end).save_pretrained(
            tmp_path / end
        )
    path = config_file(tmp_path, tokenizer=str(tmp_path / "word0"), eod_mask_loss=True)
    folder = trained(path)
    prepare(str(path), [], 2)
    other = [f"megalite.data.tokenizer={tmp_path}/word1"]
    with pytest.raises(CheckpointError) as raised:
        prepare(str(path), other, 2)
    rule = f"must be 0, as in {folder}: another needs a new run, with megalite.train.load"
    assert str(raised.value) == (
        f"megalite.data.tokenizer: {tmp_path}/word1: end of document 1: {rule}"
    )
    shutil.rmtree(folder)
    trained(path, without=IDS)
    prepare(str(path), other, 2)


def train_prepared(
    rank: int, world_size: int, path: Path, starts: list[list[str]]
) -> list[int | str]:
    deepspeed.init_distributed("gloo")
    results: list[int | str] = []
    for overrides in starts:
        try:
            results.append(_train(prepare(str(path), overrides, world_size), rank))
        except CheckpointError as error:
            results.append(str(error))
    return results


def test_megatron_s_order_is_that_of_the_run_s_first_start(tmp_path: Path) -> None:
    """It depends on the number of samples for which it was made, which a change of steps alone must not change."""
    path = config_file(tmp_path, order="megatron")
    run = tmp_path / "run"
    assert run_ranks(2, train_prepared, path, [[]]) == [[0], [0]]
    whole = rows(run)
    state = Checkpoint.open(find_checkpoint(run)).state
    assert state["fingerprint"] == json.loads(
        json.dumps(fingerprint(prepare(str(path), [], 2).config))
    )
    assert state["fingerprint"]["megalite.data.megatron_samples"] == 8 * STEPS
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    fewer, more = ["megalite.train.steps=4"], ["megalite.train.steps=9"]
    ((code, refused), other) = run_ranks(2, train_prepared, path, [fewer, more])
    assert other == [code, refused] and code == 0
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in whole[:4]]
    assert refused == (
        f"megalite.train.steps: 9: needs 72 samples: the order of {run}/checkpoints/step_00000004 is made for 48 "
        "(megalite.data.megatron_samples): another needs a new run, with megalite.train.load"
    )
    with pytest.raises(
        CheckpointError, match="megalite.data.megatron_samples: 72: must be 48, as in "
    ):
        prepare(str(path), ["megalite.data.megatron_samples=72"], 2)
    resolved = run / "config.json"  # says what it was made for
    assert prepare(str(resolved), [], 2).config.data.megatron_samples == 48


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("checkpoints", "checkpoints must be a folder that can be written"),
        ("metrics.jsonl", "metrics.jsonl must be a file that can be written"),
    ],
)
def test_a_run_folder_with_something_else_under_its_names_is_refused(
    tmp_path: Path, name: str, rule: str
) -> None:
    """It was trained from the beginning, its rows removed, and ended at its first checkpoint."""
    path = config_file(tmp_path)
    other = tmp_path / "run" / name
    if name == "checkpoints":
        other.write_text("x")
    else:
        other.mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"megalite.train.run_dir: .*/run: {rule}"):
        prepare(str(path), [], 2)


def test_a_run_folder_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "link").symlink_to("none")
    override = f"megalite.train.run_dir={tmp_path}/link"
    with pytest.raises(ConfigError, match="link: is a link to none, which does not exist"):
        prepare(str(path), [override], 2)
    with pytest.raises(ConfigError, match=r"run_dir: .*: must not contain a null character"):
        prepare(str(path), ['megalite.train.run_dir="a\\u0000b"'], 2)
