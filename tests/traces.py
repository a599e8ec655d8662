"""Records runs step by step on forked ranks (prove/trace.py), for tests that compare layouts."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np

from megalite.config import Config
from megalite.data.indexed import marks_prefix
from megalite.data.indexed_writer import IndexedWriter
from megalite.prove.trace import Trace, record
from tests.ranks import run_ranks
from tests.small_models import MODELS, VOCABULARY
from tests.unit.data.corpora import write_corpus

LENGTH = 12
Fault = Callable[[int], contextlib.AbstractContextManager[None]]
Request = tuple[dict[str, Any], Fault, Path]
"""A resolved config, the fault on a rank, and the folder for the trace."""


@contextlib.contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


def marked_corpus(prefix: Path) -> str:
    """Writes documents of random tokens, of which 70 % count in the loss."""
    random = np.random.default_rng(1)
    documents = write_corpus(prefix, documents=60, vocabulary=VOCABULARY)
    with IndexedWriter(Path(marks_prefix(prefix)), np.uint8) as writer:
        for document in documents:
            writer.add_document((random.random(len(document)) < 0.7).astype(np.uint8))
    return str(prefix)


def document(corpus: str, family: str, tied: bool, batch: int) -> dict[str, Any]:
    """A small model's JSON; its gradients are clipped in each step."""
    return {
        "train_batch_size": batch,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": {**MODELS[family], "tie_word_embeddings": tied},
            "data": {"sequence_length": LENGTH, "train": [corpus], "loss": "marked"},
            "train": {"steps": 100, "run_dir": f"{corpus}_run"},
        },
    }


def traces(world_size: int, steps: int, requests: list[Request]) -> list[Trace]:
    """Trains each request, one after another, on the same newly forked ranks."""
    for _, _, folder in requests:
        folder.mkdir(parents=True)
    run_ranks(world_size, _record, steps, requests, timeout_seconds=240)
    return [Trace(folder) for _, _, folder in requests]


def _record(rank: int, world_size: int, steps: int, requests: list[Request]) -> None:
    deepspeed.init_distributed("gloo")
    for config, fault, folder in requests:
        with fault(rank):
            record(Config.from_dict(config), steps, folder)
