"""Every option under tools/verify_layouts.py, as a user runs it: odd sizes, accumulation, active clipping, tied
weights. Its output is the table of docs/layouts.md."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import REPOSITORY
from tests.unit.data.corpora import write_corpus

VOCABULARY, STEPS = 131, 4
EVERY = ("pipe=2,tensor=2,data=2,zero=2", "tensor=2,data=2,zero=3")
"""A run without its options: 12 samples per step."""
DOCUMENT: dict[str, Any] = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.3,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
    "megalite": {
        "model": {
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 54,
            "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 40,
            "tie_word_embeddings": True,
        },
        "data": {"sequence_length": 26},
        "train": {"steps": STEPS, "tensorboard": False},
    },
}  # fmt: skip
PLAIN_HEADS = {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
GPT2 = {
    **PLAIN_HEADS,
    "model_type": "gpt2",
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 40,
}
NEOX = {
    **PLAIN_HEADS, "model_type": "gpt_neox", "hidden_size": 36, "intermediate_size": 54, "num_hidden_layers": 3,
    "num_attention_heads": 6, "max_position_embeddings": 40, "rotary_pct": 0.34,
}  # fmt: skip
MODEL, TRAIN, ZERO = "megalite.model", "megalite.train", "zero_optimization"


def _json(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


LEVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": (EVERY, ()),
    "one KV head on tensor 2": (EVERY, (f"{MODEL}.num_key_value_heads=1",)),
    "one KV head on tensor 3": (("tensor=3,pipe=2,zero=2",), (f"{MODEL}.num_key_value_heads=1",)),
    "sequence parallelism": (EVERY, ("megalite.parallel.sequence=true",)),
    "recompute selective": (EVERY, (f"{TRAIN}.activation_checkpointing=selective",)),
    "recompute every 2 layers": (EVERY, (f"{TRAIN}.activation_checkpointing=2",)),
    "recompute full, sequence": (EVERY, (f"{TRAIN}.activation_checkpointing=full", "megalite.parallel.sequence=true")),
    "z-loss": (EVERY, (f"{TRAIN}.z_loss=0.01",)),
    "documents apart": (EVERY, ("megalite.data.reset_attention=true",)),
    "sliding window": (
        EVERY, (f"{MODEL}.model_type=mistral", f"{MODEL}.num_key_value_heads=6", f"{MODEL}.sliding_window=7")),
    "gpt2": (EVERY, (_json(MODEL, GPT2),)),
    "dropout of gpt2, sequence": (
        EVERY, (_json(MODEL, GPT2 | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
                "megalite.parallel.sequence=true"),
    ),
    "dropout of gpt_neox, recompute full": (
        EVERY, (_json(MODEL, NEOX | {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
                f"{TRAIN}.activation_checkpointing=full"),
    ),
    "offload of the optimizer": (
        ("pipe=2,tensor=2,zero=1", *EVERY), (f"{ZERO}.offload_optimizer.device=cpu",)),
    "offload of weights and optimizer": (
        ("tensor=2,data=2,zero=3", "data=3,zero=3"),
        (f"{ZERO}.offload_optimizer.device=cpu", f"{ZERO}.offload_param.device=cpu")),
    "weights whole below a size": (("data=3,zero=3",), (f"{ZERO}.stage3_param_persistence_threshold=40",)),
    "a bucket smaller than a matrix": (EVERY, (f"{ZERO}.reduce_bucket_size=500",)),
    "groups by name": (
        EVERY, (_json(f"{TRAIN}.parameter_groups", [
            {"match": "embedding.*", "weight_decay": 0.0}, {"match": "layers.*.mlp.*", "lr_ratio": 0.3}]),)),
    "initial weights by key": (EVERY, (_json(f"{TRAIN}.init", {"std": 0.05, "depth_scaled": True}),)),
    "a growing batch": (
        EVERY, (_json(f"{TRAIN}.batch_ramp", {"start": 4, "increment": 4, "samples": 20}),
                "train_micro_batch_size_per_gpu=1"),
    ),
    "wsd, warm-up in tokens": (
        EVERY, (_json("scheduler", {"type": "wsd", "params": {"warmup_tokens": 500, "decay_steps": 1}}),)),
    "Adam": (EVERY, ("optimizer.type=Adam",)),
    "SGD with momentum": (
        EVERY, (_json("optimizer", {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}),)),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lever", LEVERS)
def test_layouts_agree_with_a_lever(lever: str, tmp_path: Path) -> None:
    layouts, keys = LEVERS[lever]
    write_corpus(tmp_path / "corpus", documents=60, vocabulary=VOCABULARY)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DOCUMENT))
    places = [
        _json("megalite.data.train", [str(tmp_path / "corpus")]),
        f"{TRAIN}.run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "tools/verify_layouts.py", "--deepspeed_config", str(config), "--steps", str(STEPS),
         "--layouts", *layouts, "--set", *places, *keys],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^(\S+=\S+) +([\d.e+-]+.*?)  agrees$", done.stdout, re.MULTILINE)
    assert len(table) == len(layouts), done.stdout
    shares = [f"`{layout}` {max(map(float, figures.split())):.2g}" for layout, figures in table]
    print(f"\n| {lever} | {', '.join(shares)} |")
