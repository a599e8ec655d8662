"""Small runs for GPUs: a Llama with grouped queries and a corpus of random tokens."""

from pathlib import Path
from typing import Any

from megalite.config import Config
from tests.unit.data.corpora import write_corpus

VOCABULARY = 1024


def config(
    folder: Path, ranks: int = 1, zero: int = 1, precision: str = "bf16", **keys: Any
) -> dict[str, Any]:
    """A resolved config. keys: `model`, `data`, `train` and `parallel` change those sections, others the top level."""
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus", 400, vocabulary=VOCABULARY)
    model = {
        "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "sliding_window": None,
    }  # fmt: skip
    run = {
        "steps": 10,
        "run_dir": str(folder / "run"),
        "checkpoint_interval": 0,
        "tensorboard": False,
    }
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": zero},
        precision if precision != "fp32" else "bf16": {"enabled": precision != "fp32"},
        "megalite": {
            "model": model | keys.pop("model", {}),
            "parallel": keys.pop("parallel", {}),
            "data": {"sequence_length": 128, "train": [str(folder / "corpus")]}
            | keys.pop("data", {}),
            "train": run | keys.pop("train", {}),
        },
    }
    return Config.from_dict(document | keys).resolve(ranks).to_json()
