"""Small runs for GPUs: a Llama with grouped queries and a corpus of random tokens."""

from pathlib import Path
from typing import Any

from megalite.config import Config, load_config
from tests.ranks import REPOSITORY
from tests.unit.data.corpora import write_corpus

VOCABULARY = 1024
MODELS: dict[str, dict[str, int]] = {
    "1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "4 layers of 7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
"""Whose throughput is measured."""


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


def large(folder: Path, name: str, ranks: int = 1, **keys: Any) -> dict[str, Any]:
    """One of `MODELS`. keys: as in `config`."""
    data = {"sequence_length": 4096}
    return config(folder, ranks, model=dict(MODELS[name]), data=data, train_batch_size=8, **keys)


def llama_7b_of_64(folder: Path) -> dict[str, Any]:
    """The shipped config of 64 ranks with fewer micro-batches; the corpus must be there."""
    keys = ["train_batch_size=32", f'megalite.data.train=["{folder / "corpus"}"]']
    keys += ["megalite.data.valid=[]", "megalite.data.tokenizer=null"]
    file = str(REPOSITORY / "ds_configs/llama_7b_3d.json")
    return load_config(file, keys).resolve(64).to_json()


def figures(told: dict[str, Any]) -> str:
    """The result of work.py's `throughput` as a line for docs/gpus.md."""
    return (
        f"{told['parameters'] / 1e9:.2f} B parameters, {told['tokens_per_second']:,.0f} tokens/s, "
        f"{told['tflops_per_rank']:.0f} TFLOP/s per GPU, MFU {100 * told['mfu']:.1f} %, "
        f"peak {told['peak_bytes'] / 2**30:.1f} GiB"
    )
