"""Contender: transformers' Trainer over DeepSpeed, with a plain DeepSpeed config."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler, TensorDataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from megalite.races.race_turns import Turns, request


class TakesTurns(TrainerCallback):
    """Waits before each step and answers after it."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.loss = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.end(self.loss)


class InOrder(Trainer):
    """A Trainer that reads samples in order and records the loss."""

    noted: TakesTurns

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.noted.loss = loss.item()
        return loss


def main() -> None:
    asked = request()
    turns = TakesTurns(Turns())
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    tokens = torch.from_numpy(np.load(asked["tokens"]))
    steps = tokens.shape[0]
    keys = json.loads(Path(asked["deepspeed"]).read_text())
    arguments = TrainingArguments(
        output_dir=asked["output"],
        per_device_train_batch_size=keys["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=keys["gradient_accumulation_steps"],
        max_steps=steps,
        learning_rate=asked["learning_rate"],
        weight_decay=asked["weight_decay"],
        max_grad_norm=asked["clipping"],
        lr_scheduler_type="constant",
        bf16=asked["bf16"],
        deepspeed=keys,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = TensorDataset(tokens.flatten(0, 1))

    def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([row[0] for row in rows])
        return {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "labels": ids[:, :-1]}

    trainer = InOrder(model, arguments, collate, dataset, callbacks=[turns])
    trainer.noted = turns
    trainer.train()


if __name__ == "__main__":
    main()
