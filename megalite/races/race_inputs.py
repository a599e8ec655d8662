"""The inputs of all contenders of a race: initial weights in a Hugging Face folder, and the tokens of each step in
order.

The tokens are those that our loader reads from a synthetic corpus, so that the training program reads it as usual and
the others read the same tokens from an array. Next: referee.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config.section import parse
from megalite.config.sections import Data
from megalite.data.indexed_writer import write_index
from megalite.data.loader import TrainData

LEARNING_RATE, WEIGHT_DECAY, CLIPPING, SEED = 1e-4, 0.1, 1.0, 1234
DOCUMENT_TOKENS = 1000


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes of the model and of a sample."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    length: int

    def config(self) -> dict[str, Any]:
        """The model as a Hugging Face config."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.length,
            "tie_word_embeddings": False,
        }


SMALL = Shape(hidden=384, layers=12, intermediate=1024, vocabulary=16384, length=512)  # 33.8 M
WIDE = Shape(hidden=1024, layers=3, intermediate=2816, vocabulary=8192, length=512)  # 55.3 M


def make_inputs(folder: Path, shape: Shape, batch: int, steps: int) -> None:
    """Writes `model/`, `corpus.bin` with `corpus.idx`, and `tokens.npy`, int64 [steps, batch, S + 1]: samples with the
    label of their last token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    config = shape.config()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(
        folder / "model"
    )
    chance = np.random.default_rng(SEED)
    documents = -(-4 * batch * steps * shape.length // DOCUMENT_TOKENS)
    # Frequencies fall off as those of words do, so there is something to learn.
    ids = (shape.vocabulary * chance.random(documents * DOCUMENT_TOKENS) ** 3).astype(np.uint16)
    ids.tofile(folder / "corpus.bin")
    sizes = np.full(documents, DOCUMENT_TOKENS, np.int32)
    write_index(folder / "corpus.idx", np.dtype(np.uint16), sizes, None)
    data = TrainData(parse(Data, _data_keys(folder, shape)), SEED, shape.vocabulary, check=False)
    read = data.batch(range(batch * steps))
    tokens = np.concatenate([read.tokens, read.labels[:, -1:]], axis=1)
    np.save(folder / "tokens.npy", tokens.reshape(steps, batch, shape.length + 1))


def _data_keys(folder: Path, shape: Shape) -> dict[str, Any]:
    return {"train": [str(folder / "corpus")], "sequence_length": shape.length}


def optimizer_keys() -> dict[str, Any]:
    """DeepSpeed's optimizer section; the others' optimizers use the same values."""
    params = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "torch_adam": True, "fused": True}
    return {"type": "AdamW", "params": params}


def deepspeed_keys(batch: int, micro: int, ranks: int, zero: int, bf16: bool) -> dict[str, Any]:
    """A DeepSpeed JSON."""
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * ranks),
        "gradient_clipping": CLIPPING,
        "optimizer": optimizer_keys(),
        "zero_optimization": {"stage": zero},
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }


def our_keys(
    folder: Path,
    shape: Shape,
    batch: int,
    micro: int,
    data: int,
    zero: int,
    bf16: bool,
    **parallel: Any,
) -> dict[str, Any]:
    """The JSON of our run: DeepSpeed's keys and ours."""
    keys = deepspeed_keys(batch, micro, data, zero, bf16)
    del keys["gradient_accumulation_steps"]
    run = {
        "steps": 10**6,
        "seed": SEED,
        "run_dir": str(folder / "run"),
        "load": str(folder / "model"),
    }
    run |= {"eval_interval": 0, "checkpoint_interval": 0, "log_interval": 10**6}
    keys["optimizer"] = {
        "type": "AdamW",
        "params": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    }
    keys["megalite"] = {
        "model": str(folder / "model"),
        "parallel": parallel,
        "data": _data_keys(folder, shape),
        "train": run,
    }
    return keys


def peer_request(folder: Path, batch: int, micro: int, bf16: bool, **more: Any) -> dict[str, Any]:
    """The request that the peers' modules read."""
    return {
        "model": str(folder / "model"),
        "tokens": str(folder / "tokens.npy"),
        "batch": batch,
        "micro": micro,
        "bf16": bf16,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "clipping": CLIPPING,
        **more,
    }


def write_json(path: Path, value: Any) -> str:
    """Writes a JSON file; returns its path as text."""
    path.write_text(json.dumps(value))
    return str(path)
