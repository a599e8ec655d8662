"""Texts that a run continues at each evaluation, on any layout: `megalite.train.sample_prompts`.

They go through the run's own pipeline, with any schedule, chunks and ZeRO stage, as in an evaluation. There is no
cache: each token takes a forward of the whole text, since the texts are few and short. Every data rank does the same
work. launcher/generate.py is for more. B prompts, S tokens, V vocabulary, t ranks of the tensor axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import Config
from megalite.data.tokenizer import Tokenizer, continuation, load_tokenizer, prompt_ids
from megalite.errors import ConfigError
from megalite.model.context import Context
from megalite.model.spec import TransformerSpec
from megalite.parallel.grid import Grid
from megalite.parallel.likeliest_token import likeliest_token
from megalite.parallel.rows import Rows
from megalite.pipeline.actions import Pipeline
from megalite.training.watchers import Row, Watcher

PROMPTS = "megalite.train.sample_prompts"
UNIT = 16  # lengths are multiples of this, so that kernels see few shapes


def encoded_prompts(config: Config, spec: TransformerSpec) -> tuple[Tokenizer, list[list[int]]]:
    """The tokenizer and the prompts' ids. Raises ConfigError if a prompt cannot be continued."""
    train, data = config.train, config.data
    if data.tokenizer is None:
        raise ConfigError(f"{PROMPTS}: needs megalite.data.tokenizer, which is left out")
    if not spec.causal or spec.labels:
        kind = "a classifier" if spec.labels else "an encoder"
        rule = "needs a decoder, such as llama"
        raise ConfigError(f"{PROMPTS}: this {spec.family} model is {kind}: {rule}")
    tokenizer = load_tokenizer(data.tokenizer)
    prompts = [prompt_ids(tokenizer, prompt) for prompt in train.sample_prompts]
    for number, ids in enumerate(prompts):
        total = len(ids) + train.sample_tokens
        if not ids or total > data.sequence_length:
            rule = f"must be 1 to {data.sequence_length}, as megalite.data.sequence_length"
            asked = f"{len(ids)} tokens + megalite.train.sample_tokens {train.sample_tokens}"
            raise ConfigError(f"{PROMPTS}.{number}: {asked}: {rule}")
        if max(ids) >= spec.vocabulary_size:
            rule = f"must be below the model's vocab_size {spec.vocabulary_size}"
            raise ConfigError(f"{PROMPTS}.{number}: has id {max(ids)}: {rule}")
    return tokenizer, prompts


class Sampler(Watcher):
    """Adds `samples`, a list of prompts and texts, to the rows of evaluations on rank 0 (collective)."""

    def __init__(
        self, config: Config, spec: TransformerSpec, grid: Grid, pipeline: Pipeline
    ) -> None:
        self.prompts, self.count = config.train.sample_prompts, config.train.sample_tokens
        self.spec, self.grid, self.pipeline = spec, grid, pipeline
        self.size, self.length = config.micro_batch_size, config.data.sequence_length
        self.by_heads = config.parallel.context_attention == "heads"
        self.prefixed = config.data.objective == "prefix"
        self.tokenizer: Tokenizer | None = None
        message: list[Any] = [None, None]
        if grid.rank == 0:
            self.tokenizer, ids = encoded_prompts(config, spec)
            message = [ids, self.tokenizer.eod_id]
        dist.broadcast_object_list(message)
        self.ids: list[list[int]] = message[0]
        self.eod: int | None = message[1]

    def evaluated(self, row: Row) -> None:
        """Continues all prompts greedily."""
        texts: list[list[int]] = []
        for first in range(0, len(self.ids), self.size):
            texts += self._continue(self.ids[first : first + self.size])
        if self.tokenizer is None:
            return
        row["samples"] = [
            {"prompt": prompt, "text": continuation(self.tokenizer, ids, new)}
            for prompt, ids, new in zip(self.prompts, self.ids, texts, strict=True)
        ]

    def _continue(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The new tokens of at most B prompts, on every rank."""
        ends = [len(ids) for ids in prompts]
        unit = UNIT * self.grid.tensor.size * self.grid.context.size
        longest = max(ends) + self.count
        padded = min(self.length, -(-longest // unit) * unit)
        # Unused rows and the padding after a text change nothing: tokens attend only to earlier ones and to their
        # prompt.
        tokens = torch.zeros(self.size, padded, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = torch.tensor(ids)
        prefixes = None
        if self.prefixed:
            rows = torch.tensor([*ends, *[0] * (self.size - len(ends))]).unsqueeze(-1)
            prefixes = torch.arange(padded) < rows
        for _ in range(self.count):
            chosen = self._next(tokens, ends, prefixes)
            for row, end in enumerate(ends):
                tokens[row, end] = chosen[row]
            ends = [end + 1 for end in ends]
        texts = [
            tokens[row, len(ids) : end].tolist()
            for row, (ids, end) in enumerate(zip(prompts, ends, strict=True))
        ]
        return [text[: text.index(self.eod)] if self.eod in text else text for text in texts]

    def _next(self, tokens: Tensor, ends: Sequence[int], prefixes: Tensor | None) -> list[int]:
        """The likeliest token after each text, the same on every rank. prefixes: as in Context."""
        pipe, device = self.grid.pipe, self.pipeline.engine.device
        rows = Rows.along(self.grid.context, tokens.shape[1], self.by_heads)
        own = tokens if rows is None else rows.cut(tokens, 1)
        shape = self.pipeline.engine.stage.hidden_shape(*tokens.shape)
        context = Context(rows=rows, prefixes=None if prefixes is None else prefixes.to(device))
        logits = self.pipeline.logits(own.to(device), shape, context)
        chosen = torch.zeros(len(ends), dtype=torch.int64, device=device)
        if logits is not None:
            several = torch.arange(len(ends), device=device)
            last = torch.tensor(ends, device=device) - 1
            if rows is None:
                logits = logits[several, last].unsqueeze(1)
            # [B, 1 or S / c]
            found = likeliest_token(logits, self.spec.vocabulary_size, self.grid.tensor)
            chosen = found[: len(ends), 0] if rows is None else rows.gathered(found)[several, last]
        if pipe.size > 1:
            cut = self.pipeline.plan.cut
            dist.broadcast(chosen, pipe.ranks[cut.home[cut.last_chunk]], group=pipe.group)
        return chosen.tolist()
