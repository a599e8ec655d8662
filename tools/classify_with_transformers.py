#!/usr/bin/env python3
"""Train a classifier with transformers' Trainer and the settings of our config, to compare accuracies: from given
weights, on the same texts, about equally many per step, with the same learning rates.

    python tools/classify_with_transformers.py --deepspeed_config ds_configs/topics.json --model FOLDER [KEY=VALUE …]

FOLDER: a model for `AutoModelForSequenceClassification`, such as tools/export_hf.py writes. Prints a JSON line with the
figures of our evaluation (docs/classification.md). Supports the schedulers `linear` to 0 and `constant`; one process.
"""

import megalite.ranks.startup  # noqa: F401  (first: see there)

# isort: split
import json
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import Config, Data, load_config
from megalite.data.indexed import IndexedCorpus, labels_prefix
from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, at_least
from megalite.ranks.run_program import run_program
from megalite.training.classification import figures


@dataclass
class Texts(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """The texts of a config's corpora, truncated as in packing.py, each with the number of its label."""

    prefixes: list[str]
    longest: int

    def __post_init__(self) -> None:
        self.rows: list[tuple[np.ndarray, int]] = []
        for prefix in self.prefixes:
            corpus, labels = IndexedCorpus(prefix), IndexedCorpus(labels_prefix(prefix))
            for number in range(corpus.num_documents):
                label = int(labels.document(number)[0])
                self.rows.append((corpus.document(number)[: self.longest], label))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.rows[number]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--deepspeed_config", required=True, metavar="FILE")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument(
        "--seed", type=at_least(0), help="seed of the order (default: the config's)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    config = load_config(args.deepspeed_config, args.overrides).resolve(1)
    if not config.data.classes or not config.data.valid:
        rule = 'must be {"classes": […]}, with megalite.data.valid'
        raise ConfigError(f"megalite.data.objective: {rule}")
    print(json.dumps(trained(config, args.model, args.seed)))
    return 0


def trained(config: Config, folder: str, seed: int | None = None) -> dict[str, Any]:
    """Trains; returns the loss of the first step, and the figures after the last."""
    from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer

    data = config.data
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(data.classes), dtype=torch.float32, attn_implementation="sdpa"
    )
    train, valid = _texts(data, "train"), _texts(data, "valid")
    padding = model.config.pad_token_id

    def collate(rows: list[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.full((len(rows), longest), padding)
        for row, (ids, _) in enumerate(rows):
            tokens[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        places = torch.arange(longest)
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        labels = torch.tensor([label for _, label in rows])
        return {
            "input_ids": tokens,
            "attention_mask": (places < lengths.unsqueeze(-1)).long(),
            "labels": labels,
        }

    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(config, train, scratch, seed)
        trainer = Trainer(model, arguments, collate, train, valid)
        trainer.remove_callback(PrinterCallback)  # keeps standard output for the result
        trainer.train()
        logits, labels, _ = trainer.predict(valid)  # type: ignore[arg-type]
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    table = np.zeros((len(data.classes),) * 2)
    np.add.at(table, (labels, np.asarray(logits).argmax(-1)), 1)  # type: ignore[call-overload]
    return {"first_loss": first, **figures(table.flatten().tolist(), data.classes)}


def _texts(data: Data, part: str) -> Texts:
    return Texts([source.path for source in getattr(data, part)], data.sequence_length)


def _arguments(config: Config, train: Texts, scratch: str, seed: int | None) -> Any:
    """The config as transformers' arguments. Texts per step: as many as fill the samples of one step."""
    from transformers import TrainingArguments

    schedule = config.schedule
    kinds = {"constant": "constant_with_warmup", "linear": "linear"}
    rule = "must be constant, or linear to 0 at megalite.train.steps"
    if schedule is None or schedule.type not in kinds:
        raise ConfigError(f"scheduler.type: {rule}")
    if schedule.type == "linear" and (
        schedule.min_ratio or schedule.total_steps != config.train.last_step
    ):
        raise ConfigError(f"scheduler.params: {rule}")
    params, tokens = config.optimizer.params, sum(len(ids) for ids, _ in train.rows)
    step_tokens = config.train_batch_size * config.data.sequence_length
    b1, b2 = params.betas or (0.9, 0.999)
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=max(1, round(len(train) * min(1.0, step_tokens / tokens))),
        per_device_eval_batch_size=64,
        max_steps=config.train.last_step,
        learning_rate=params.lr,
        weight_decay=params.weight_decay,
        adam_beta1=b1,
        adam_beta2=b2,
        adam_epsilon=params.eps or 1e-8,
        max_grad_norm=config.gradient_clipping,
        lr_scheduler_type=kinds[schedule.type],
        warmup_steps=schedule.warmup_steps,
        seed=config.train.seed if seed is None else seed,
        use_cpu=not torch.cuda.is_available(),
        logging_first_step=True,
        logging_steps=config.train.last_step + 1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


if __name__ == "__main__":
    run_program(main)
