"""Likelihoods of given tokens, on any layout, for choosing among answers (labels.py) and for lm-eval (harness.py). B
rows per batch, S positions, V / t logits of a rank.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.data.chat_encoder import Marked
from megalite.inference.sampling import Sampling, choose
from megalite.model.context import Context
from megalite.model.transformer import Stage
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.loss import IGNORED, token_losses
from megalite.pipeline.forwards import Forwards


class Likelihood(NamedTuple):
    """log_probability: of all marked tokens of a row, in nats. greedy: whether each was the likeliest at its
    position."""

    log_probability: float
    greedy: bool


@torch.inference_mode()
def likelihoods(
    stage: Stage,
    grid: Grid,
    rows: Sequence[Marked],
    batch_size: int = 8,
    prefixed: bool = False,
) -> list[Likelihood]:
    """Likelihoods of each row's marked tokens, each given all before it; the same on every rank (collective over the
    world).

    A row's first token has none before it and never counts. batch_size: rows that a data rank passes through the stages
    together; logits of all their positions are held in memory. prefixed: attention within the tokens before a row's
    first marked one is bidirectional.
    """
    stage.eval()
    axis, weight = grid.pipe, next(stage.parameters())
    by_length = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
    batches = [by_length[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    # Sum of losses, number of tokens that are not the likeliest.
    sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=weight.device)
    own = batches[grid.data.rank :: grid.data.size]
    ready: dict[int, tuple[Tensor, Tensor, Context]] = {}

    def numbers() -> Iterator[int]:
        for number, batch in enumerate(own):
            ready[number] = _batch([rows[row] for row in batch], prefixed, weight.device)
            yield number

    def forward(number: int, hidden: Tensor | None) -> Tensor:
        tokens, labels, context = ready.pop(number)
        output = stage(tokens if hidden is None else hidden, context=context)
        if axis.is_last:
            sums[own[number]] = _sums(output, labels, stage.spec.vocabulary_size, grid.tensor)
        return output

    def shape(number: int) -> tuple[int, ...]:
        return *ready[number][0].shape, stage.spec.hidden_size

    Forwards(axis, weight.dtype, weight.device).run(numbers(), forward, shape)
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= grid.tensor.size  # every rank of the tensor axis has the same sum
    return [Likelihood(-loss, missed < 0.5) for loss, missed in sums.tolist()]


def _batch(
    rows: Sequence[Marked], prefixed: bool, device: torch.device
) -> tuple[Tensor, Tensor, Context]:
    """Tokens and labels [B, S] of the rows, and their context."""
    tokens, labels = _padded(rows)
    context = Context(lengths=torch.tensor([len(ids) - 1 for ids, _ in rows], device=device))
    if prefixed:
        prompts = torch.tensor([_prompt(marks) for _, marks in rows])
        places = torch.arange(tokens.shape[1])
        context.prefixes = (places < prompts.unsqueeze(-1)).to(device)
    return tokens.to(device), labels.to(device), context


def _prompt(marks: Sequence[int]) -> int:
    """The number of tokens before the first marked one."""
    return next((place for place, mark in enumerate(marks) if mark), len(marks))


def _padded(rows: Sequence[Marked]) -> tuple[Tensor, Tensor]:
    """Tokens and labels int64 [B, S], padded on the right, to which no token that counts attends."""
    length = max(1, max(len(ids) for ids, _ in rows) - 1)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (ids, marks) in enumerate(rows):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1], dtype=torch.int64)
        counted = [
            token if mark else IGNORED for token, mark in zip(ids[1:], marks[1:], strict=True)
        ]
        labels[row, : len(ids) - 1] = torch.tensor(counted, dtype=torch.int64)
    return tokens, labels


def _sums(logits: Tensor, labels: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """For each row the sum of losses and the number of counted tokens that are not the likeliest, fp64 [B, 2]. logits:
    [B, S, V / t]. labels: [B, S]."""
    places = labels != IGNORED
    rows, wanted, chosen = places.nonzero()[:, 0], labels[places], logits[places].float()
    missed = choose(chosen, vocabulary_size, axis, Sampling(), ()) != wanted
    losses = token_losses(chosen, wanted, vocabulary_size, axis)
    found = torch.stack([losses, missed], dim=-1).double()
    sums = torch.zeros(len(labels), 2, dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, rows, found)
