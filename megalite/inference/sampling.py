"""The choice of the next token from logits that the tensor axis splits; the same token on every layout.

B rows, V vocabulary, t size of the tensor axis. A greedy choice sends two numbers per row over the axis, top-k sends k
candidates per rank; only sampling from the whole vocabulary, or a repetition penalty, gathers all logits. Random
numbers are a function of (seed, prompt, position in the text), so they depend neither on the layout nor on which
prompts share a batch. The penalty and min-p are transformers' logits processors on gathered logits, so the result is
the same on every rank. Next: generate.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from megalite.errors import ConfigError
from megalite.parallel.collectives import gather_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share
from megalite.parallel.likeliest_token import likeliest_token


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises ConfigError for a value out of range.

    temperature: logits are divided by it; 0 takes the likeliest. top_k: sample from the k likeliest; None: from all.
    top_p: sample from the smallest set of likeliest tokens with this total probability (arXiv 1904.09751).
    repetition_penalty: logits of tokens that the prompt or the text contains are divided by it if they are positive,
    otherwise multiplied (arXiv 1909.05858); 1 does nothing. min_p: only tokens with at least this share of the
    likeliest's probability (arXiv 2407.01082); 0 allows all. They apply in transformers' order:
    repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1234
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature: {self.temperature}: must be a number of 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k: {self.top_k}: must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p: {self.top_p}: must be above 0 and at most 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"--repetition-penalty: {self.repetition_penalty}: must be a number above 0"
            )
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"--min-p: {self.min_p}: must be from 0 to 1")
        if self.temperature == 0.0 and (
            self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0
        ):
            raise ConfigError(
                "--temperature: 0: must be above 0 with --top-k, --top-p or --min-p: 0 takes the likeliest token"
            )


def choose(
    logits: Tensor,
    vocabulary_size: int,
    axis: Axis,
    sampling: Sampling,
    positions: Sequence[tuple[int, int]],
    held: Sequence[Sequence[int]] = (),
) -> Tensor:
    """The next token of each row, int64 [B], the same on every rank of the axis (collective over it).

    logits: [B, V / t]. positions: for each row its prompt's number and the position of the new token. held: with a
    repetition penalty, the tokens of each row's prompt and text so far.
    """
    start, _ = share(vocabulary_size, axis)
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = _penalised(logits, vocabulary_size, axis, sampling.repetition_penalty, held)
    if sampling.temperature == 0.0:
        return likeliest_token(logits, vocabulary_size, axis)
    scores, ids = _candidates(
        logits / sampling.temperature, start, vocabulary_size, axis, sampling.top_k
    )
    chances = torch.tensor(
        [uniform(sampling.seed, *position) for position in positions], dtype=torch.float64
    )
    rank = _draw(scores, sampling.top_p, sampling.min_p, chances.to(scores.device))
    return ids.gather(-1, rank.unsqueeze(-1)).squeeze(-1)


def _penalised(
    logits: Tensor, vocabulary_size: int, axis: Axis, penalty: float, held: Sequence[Sequence[int]]
) -> Tensor:
    """This rank's logits [B, V / t] after the penalty on each row's tokens (collective over the axis)."""
    start, stop = share(vocabulary_size, axis)
    longest = max(map(len, held))
    # Rows are padded with their own last token, since a token that occurs twice is penalised only once.
    rows = [[*row, *([row[-1]] * (longest - len(row)))] for row in held]
    whole = _whole(logits, vocabulary_size, axis)
    ids = torch.tensor(rows, dtype=torch.int64, device=logits.device)  # [B, longest]
    penalise: Any = RepetitionPenaltyLogitsProcessor(float(penalty))
    return penalise(ids, whole)[:, start:stop]


def _whole(logits: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """The shares [B, V / t] of all ranks concatenated: [B, V], in the order of the vocabulary."""
    largest_share = -(-vocabulary_size // axis.size)
    padded = torch.nn.functional.pad(logits, (0, largest_share - logits.shape[-1]))
    parts = gather_over(padded, axis)
    shares = [share(vocabulary_size, replace(axis, rank=rank)) for rank in range(axis.size)]
    pairs = zip(parts, shares, strict=True)
    return torch.cat([part[:, : stop - start] for part, (start, stop) in pairs], dim=-1)


def _candidates(
    scores: Tensor, start: int, vocabulary_size: int, axis: Axis, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of all ranks, likeliest first, ties by the lower id: scores and ids [B, k]."""
    largest_share = -(-vocabulary_size // axis.size)
    width = min(top_k or largest_share, largest_share)
    ordered, columns = scores.sort(dim=-1, descending=True, stable=True)
    # Shares differ by one if the vocabulary does not divide evenly.
    missing = max(0, width - ordered.shape[-1])
    ordered = torch.nn.functional.pad(ordered[:, :width], (0, missing), value=-torch.inf)
    ids = torch.nn.functional.pad(columns[:, :width] + start, (0, missing))
    ordered = gather_over(ordered, axis).transpose(0, 1).flatten(1)  # [B, t · width]
    ids = gather_over(ids, axis).transpose(0, 1).flatten(1)
    ordered, order = ordered.sort(dim=-1, descending=True, stable=True)
    count = min(top_k or vocabulary_size, ordered.shape[-1])
    return ordered[:, :count], ids.gather(-1, order)[:, :count]


def likeliest(
    scores: Tensor, vocabulary_size: int, axis: Axis, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of all ranks, or all if there are fewer, likeliest first, ties by the lower id:
    scores and ids [B, count], the same on every rank (collective over the axis). scores: [B, V / t]."""
    start, _ = share(vocabulary_size, axis)
    return _candidates(scores, start, vocabulary_size, axis, min(count, vocabulary_size))


def _draw(scores: Tensor, top_p: float, min_p: float, chances: Tensor) -> Tensor:
    """The index of the candidate that each row's random number in [0, 1) selects. scores: [B, k], likeliest first."""
    probabilities = scores.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    refused = before >= top_p  # the likeliest always stays
    if min_p > 0.0:
        warp: Any = MinPLogitsWarper(float(min_p))
        refused |= warp(None, scores.masked_fill(refused, -torch.inf)) == -torch.inf
    probabilities = probabilities.masked_fill(refused, 0.0)
    sums = probabilities.cumsum(dim=-1)
    target = chances * sums[:, -1]
    return (sums <= target.unsqueeze(-1)).sum(dim=-1).clamp(max=scores.shape[-1] - 1)


def uniform(seed: int, prompt: int, position: int) -> float:
    """A random number in [0, 1) for a position in the text that continues a prompt."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53
