"""Peak of torch's allocations in a step of the real engine, compared with the planner's timeline
(plan/memory_timeline.py)."""

from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest

from megalite.config import Config
from megalite.prove import step_turns
from megalite.prove.calibrate import random_corpus
from megalite.prove.ranking import predicted_peak
from tests.ranks import run_ranks
from tests.small_models import MODELS

WITHIN = 0.02
# Products in bf16 on a CPU have scratch memory; reference cycles of the tensor axis's Python functions are freed only
# by the garbage collector.
WITHIN_LOOSE = 0.04
LENGTH, VOCABULARY = 64, 512
SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_inner": 256, "n_positions": LENGTH},
    "qwen3_moe": {"hidden_size": 64, "num_hidden_layers": 4},
}


def config_of(folder: str, model: str, count: int, micro: int, **keys: Any) -> dict[str, Any]:
    """A resolved config of two ranks; count: micro-batches."""
    parallel = {
        name: keys.pop(name) for name in ("pipe", "tensor", "schedule", "sequence") if name in keys
    }
    tied = keys.pop("tied", False)
    train = {name: keys.pop(name) for name in ("activation_checkpointing",) if name in keys}
    bf16 = {"bf16": {"enabled": True}} if keys.pop("half", False) else {}
    document = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": count,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 60_000, **keys},
        **bf16,
        "megalite": {
            "model": {
                **MODELS[model],
                **SIZES[model],
                "vocab_size": VOCABULARY,
                "tie_word_embeddings": tied,
                "max_position_embeddings": LENGTH,
            },
            "parallel": parallel,
            "data": {"sequence_length": LENGTH, "train": [f"{folder}/train"]},
            "train": {"steps": 100, "run_dir": f"{folder}/run", **train},
        },
    }
    return Config.from_dict(document).resolve(2).to_json()


Case = tuple[str, int, int, dict[str, Any]]
"""A model, micro-batches, samples of one, and keys (config_of)."""
CASES: dict[str, Case] = {
    "zero 1": ("llama", 1, 8, {}),
    "zero 1, bf16, many": ("llama", 4, 1, {"half": True}),
    "zero 2": ("llama", 3, 1, {"stage": 2}),
    "zero 3": ("llama", 1, 4, {"stage": 3, "stage3_param_persistence_threshold": 1000}),
    "full": ("llama", 2, 8, {"activation_checkpointing": "full"}),
    "tensor": ("llama", 2, 4, {"tensor": 2}),
    "zb-v, tied": ("llama", 4, 2, {"tied": True, "pipe": 2, "schedule": "zb-v"}),
}
MORE: dict[str, Case] = {
    "zero 0": ("llama", 2, 2, {"stage": 0}),
    "zero 1, many": ("llama", 4, 1, {}),
    "zero 1, bf16": ("llama", 1, 8, {"half": True}),
    "zero 2, bf16": ("llama", 3, 1, {"stage": 2, "half": True}),
    "zero 2, bf16, one": ("llama", 1, 8, {"stage": 2, "half": True}),
    "zero 3, bf16": (
        "llama", 2, 2, {"stage": 3, "half": True, "stage3_param_persistence_threshold": 1000},
    ),
    "gpt2": ("gpt2", 2, 4, {}),
    "gpt2, bf16": ("gpt2", 2, 4, {"half": True}),
    "gpt2, tied": ("gpt2", 2, 4, {"tied": True}),
    "experts": ("qwen3_moe", 2, 4, {}),
    "groups": ("llama", 2, 8, {"activation_checkpointing": 2}),
    "selective": ("llama", 2, 8, {"activation_checkpointing": "selective"}),
    "sequence": ("llama", 2, 4, {"tensor": 2, "sequence": True}),
    "pipe": ("llama", 4, 2, {"pipe": 2}),
    "pipe, bf16, zero 2": ("llama", 4, 2, {"pipe": 2, "stage": 2, "half": True}),
    "zb-h1": ("llama", 4, 2, {"pipe": 2, "schedule": "zb-h1"}),
    "zb-v, bf16": ("llama", 4, 2, {"pipe": 2, "schedule": "zb-v", "half": True}),
}  # fmt: skip


def on_rank(rank: int, world_size: int, configs: list[dict[str, Any]]) -> list[int]:
    deepspeed.init_distributed("gloo")
    # On a busy machine gloo's threads free memory late in more of the steps; one quiet step is enough.
    with mock.patch.object(step_turns, "WEIGHED_STEPS", 10):
        return [row["peak_bytes"] for row in step_turns.in_turns(configs, 0)]


def check(folder: Path, cases: dict[str, Case]) -> None:
    random_corpus(folder / "train", VOCABULARY, 20_000)
    configs = [
        config_of(str(folder), model, count, micro, **keys)
        for model, count, micro, keys in cases.values()
    ]
    ranks, wrong = run_ranks(2, on_rank, configs), []
    for number, (name, (*_, keys)) in enumerate(cases.items()):
        measured = max(rank[number] for rank in ranks)
        predicted = predicted_peak(Config.from_dict(configs[number]))
        within = WITHIN_LOOSE if {"half", "tensor"} & set(keys) else WITHIN
        if predicted != pytest.approx(measured, rel=within):
            wrong.append(f"{name}: predicted {predicted:,}, measured {measured:,}")
    assert not wrong, "\n".join(wrong)


def test_peaks(tmp_path: Path) -> None:
    check(tmp_path, CASES)


@pytest.mark.long
def test_peaks_of_more(tmp_path: Path) -> None:
    check(tmp_path, MORE)
