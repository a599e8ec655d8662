"""Classifiers of every family, and transformers' results for the same texts one by one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import Classified
from megalite.data.indexed import labels_prefix, names_file
from megalite.data.indexed_writer import IndexedWriter
from megalite.model.context import Context
from megalite.model.families import model_dict, read_spec
from megalite.model.families.classifiers import CLASSES
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from tests.families import FAMILY_CONFIGS, VOCABULARY, file_reader, hf_model
from tests.hf_tensors import from_hf

LABELS = ("bad", "so so", "good")
MEAN = {**FAMILY_CONFIGS["modernbert"], "classifier_pooling": "mean"}
CONFIGS: dict[str, dict[str, Any]] = {
    name: model_dict(Classified(config, LABELS))
    for name, config in {**FAMILY_CONFIGS, "modernbert, mean": MEAN}.items()
    if config["model_type"] in CLASSES
}
LENGTHS = ((6, 4), (12,), (1, 3, 5))
"""Lengths of the texts in each sample of twelve tokens; the rest is padding."""
SEQUENCE = 12


def texts() -> list[tuple[Tensor, int]]:
    """Each text and its label; none ends with a padding token of any of the models."""
    generator = torch.Generator().manual_seed(3)
    lengths = [length for sample in LENGTHS for length in sample]
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(8, 99, (length,), generator=generator)
        if length > 4:
            ids[2] = 7  # a padding token within a text
        found.append((ids, number % len(LABELS)))
    assert max(int(ids.max()) for ids, _ in found) < VOCABULARY
    return found


def batch() -> tuple[Tensor, Tensor, Context]:
    """The texts packed into three samples: tokens and labels [3, 12]."""
    tokens = torch.zeros(len(LENGTHS), SEQUENCE, dtype=torch.int64)
    labels, documents = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    waiting = iter(texts())
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            ids, label = next(waiting)
            tokens[row, start : start + length] = ids
            labels[row, start] = label
            documents[row, start : start + length] = number
            start += length
        documents[row, start:] = len(lengths)
    counted = (labels.flatten() != -100).nonzero().squeeze(-1)
    return tokens, labels, Context(documents=documents.int(), counted=counted)


def hf_scores(config: dict[str, Any]) -> tuple[Tensor, float, dict[str, Tensor]]:
    """transformers' logits [n, N] of the texts, the sum of their losses, and its gradients under our names."""
    model, spec = hf_model(config), read_spec(config)
    logits = torch.cat([model(ids.unsqueeze(0)).logits for ids, _ in texts()])
    labels = torch.tensor([label for _, label in texts()])
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    read = file_reader({name: value.grad for name, value in model.named_parameters()})
    names = [place.name for _, place in placed(Stage(spec, Grid()))]
    gradients = {name: from_hf(spec, name, read) for name in names}
    return logits.detach(), loss.item(), gradients


def labelled_corpus(prefix: Path, texts: int, mean: int) -> list[tuple[list[int], int]]:
    """Writes texts of 1 to 2·mean - 1 random tokens, from thirty tokens per label. Returns the texts with their
    labels."""
    random, found = np.random.default_rng(0), []
    for _ in range(texts):
        label = int(random.integers(len(LABELS)))
        ids = 8 + 30 * label + random.integers(0, 30, random.integers(1, 2 * mean))
        found.append((ids.tolist(), label))
    with (
        IndexedWriter(prefix, np.uint16) as tokens,
        IndexedWriter(Path(labels_prefix(prefix)), np.uint8) as labels,
    ):
        for ids, label in found:
            tokens.add_document(np.array(ids, np.uint16))
            labels.add_document(np.full(len(ids), label, np.uint8))
    names_file(prefix).write_text(json.dumps({"classes": LABELS}))
    return found
