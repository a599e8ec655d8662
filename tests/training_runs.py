"""Whole training runs on forked ranks, with a fault planted on one, for tests of how a run handles it."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch

from megalite.config import Config
from megalite.errors import TrainingError
from megalite.model.families import model_dict, read_spec
from megalite.model.transformer import Stage
from megalite.pipeline.actions import Pipeline
from megalite.training.pretraining import PreparedRun, _train
from tests.small_models import MODELS
from tests.unit.data.corpora import write_corpus

VOCABULARY, LENGTH, BATCH = 131, 12, 8
Plant = Callable[[int], contextlib.AbstractContextManager[None]]


def document(folder: Path, run: str, layout: dict[str, int], **keys: Any) -> dict[str, Any]:
    """A config of a small tied model. keys: `train` for megalite.train, others for the top level."""
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus", 60, vocabulary=VOCABULARY)
    (folder / run).mkdir(exist_ok=True)
    layout = dict(layout)
    zero = layout.pop("zero", 1)
    train = {
        "steps": 6,
        "run_dir": str(folder / run),
        "tensorboard": False,
        "checkpoint_interval": 0,
    }
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}},
        "zero_optimization": {"stage": zero},
        "megalite": {
            "model": {**MODELS["llama"], "num_hidden_layers": 2, "tie_word_embeddings": True},
            "parallel": layout,
            "data": {"sequence_length": LENGTH, "train": [str(folder / "corpus")]},
            "train": train | keys.pop("train", {}),
        },
    } | keys


@contextlib.contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


def train(rank: int, world_size: int, runs: list[tuple[dict[str, Any], Plant]]) -> list[int | str]:
    """Trains each run with its fault, one after another; returns its exit code or the error that stopped it."""
    deepspeed.init_distributed("gloo")
    results: list[int | str] = []
    for keys, plant in runs:
        config = Config.from_dict(keys).resolve(world_size)
        prepared = PreparedRun(config, read_spec(config.model), model_dict(config.model))
        with plant(rank):
            try:
                results.append(_train(prepared, rank))
            except TrainingError as error:
                results.append(str(error))
    return results


@contextlib.contextmanager
def spoilt(
    rank: int, on: int, at: set[int], factor: float, phase: str = "backward", micro_batch: int = 1
) -> Iterator[None]:
    """On rank `on`, in the calls of train_step in `at` (from 1), multiplies the stage's output for one micro-batch, or
    its gradient, by `factor`."""
    whole, forward = Pipeline.train_step, Stage.forward
    calls = 0
    pipelines: list[Any] = [None]

    def counted(self: Pipeline, *args: Any) -> Any:
        nonlocal calls
        calls, pipelines[:] = calls + 1, [self]
        return whole(self, *args)

    def forwards(self: Stage, *args: Any) -> Any:
        output = forward(self, *args)
        action = pipelines[0].interpreter.action
        if (
            calls not in at
            or not torch.is_grad_enabled()
            or action.kind != "F"
            or action.micro_batch != micro_batch
        ):
            return output
        if phase == "forward":
            return output * factor
        output.register_hook(lambda gradient: gradient * factor)
        return output

    if rank != on:
        yield
        return
    with (
        mock.patch.object(Pipeline, "train_step", counted),
        mock.patch.object(Stage, "forward", forwards),
    ):
        yield


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """A run's rows of training."""
    return [
        row
        for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
