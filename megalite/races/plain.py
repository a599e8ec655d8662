"""Contender: an ordinary training loop with transformers and torch in one process: fused AdamW, clip_grad_norm_,
autocast for bf16. `python -m megalite.races.plain REQUEST`. Also has what the other peers share."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megalite.races.race_turns import Turns, request


def load_model(asked: dict[str, Any]) -> Any:
    """transformers' model with the initial weights, in fp32, in training mode."""
    return AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).train()


def batches(asked: dict[str, Any]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> tokens and labels [B, S] of the global batch."""
    tokens = np.load(asked["tokens"])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(tokens[step])
        return ids[:, :-1], ids[:, 1:]

    return batch


def groups(parameters: Iterator[Tensor] | list[Any], asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for norms."""
    values = list(parameters)
    return [
        {
            "params": [value for value in values if value.dim() > 1],
            "weight_decay": asked["weight_decay"],
        },
        {"params": [value for value in values if value.dim() == 1], "weight_decay": 0.0},
    ]


def adam(parameters: Iterator[Tensor] | list[Any], asked: dict[str, Any]) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    return torch.optim.AdamW(groups(parameters, asked), lr=asked["learning_rate"], fused=True)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the tokens, fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    asked: dict[str, Any],
    tokens: Tensor,
    labels: Tensor,
) -> float:
    """One step: micro-batches, clipping, update. Returns the mean loss."""
    parts, total = tokens.shape[0] // asked["micro"], 0.0
    for ids, wanted in zip(tokens.chunk(parts), labels.chunk(parts), strict=True):
        with torch.autocast(tokens.device.type, torch.bfloat16) if asked["bf16"] else nullcontext():
            logits = model(ids).logits
        loss = loss_of(logits, wanted) / parts
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), asked["clipping"])
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    asked, turns = request(), Turns()
    model, batch = load_model(asked), batches(asked)
    optimizer = adam(model.parameters(), asked)
    turns.serve(lambda step: plain_step(model, optimizer, asked, *batch(step)))


if __name__ == "__main__":
    main()
