"""Rank 0 asks, all ranks answer: for a program that runs only on rank 0 and needs the model now and then (harness.py).

answers = Answers(stage, grid, …)
if rank == 0:
    try: … answers.ask("likelihoods", rows) …
    finally: answers.end()
else:
    answers.take_part()
"""

from collections.abc import Collection, Sequence
from typing import Any

from megalite.data.chat_encoder import Marked
from megalite.data.tokenizer import Tokenizer
from megalite.inference.generate import Generator, cut_at, ends_at, generate_all
from megalite.inference.likelihood import Likelihood, likelihoods
from megalite.inference.prepare import told_by_rank_0
from megalite.inference.sampling import Sampling
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid

_END = "end"


class Answers:
    """The requests that rank 0 can make to all ranks. batch_size: rows that go through the stages together. prefixed:
    as in Generator."""

    def __init__(
        self,
        stage: Stage,
        grid: Grid,
        tokenizer: Tokenizer,
        stop_ids: Collection[int],
        batch_size: int,
        prefixed: bool,
    ) -> None:
        self.stage, self.grid, self.tokenizer = stage, grid, tokenizer
        self.stop_ids, self.batch_size, self.prefixed = stop_ids, batch_size, prefixed

    def ask(self, name: str, *arguments: Any) -> Any:
        """On rank 0: calls `likelihoods` or `texts` on every rank."""
        told_by_rank_0((name, arguments))
        return getattr(self, name)(*arguments)

    def end(self) -> None:
        """On rank 0: ends `take_part` on the others."""
        told_by_rank_0((_END, ()))

    def take_part(self) -> None:
        """On other ranks: answers rank 0's requests until it calls `end`."""
        while (question := told_by_rank_0(None))[0] != _END:
            name, arguments = question
            getattr(self, name)(*arguments)

    def likelihoods(self, rows: Sequence[Marked]) -> list[Likelihood]:
        """See likelihood.py."""
        return likelihoods(self.stage, self.grid, rows, self.batch_size, self.prefixed)

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
    ) -> list[str]:
        """The text that continues each prompt's ids, up to the first of `stops`."""
        generator = Generator(self.stage, self.grid, self.batch_size, self.prefixed)
        ends = ends_at(self.tokenizer, stops)
        found = generate_all(generator, prompts, max_new_tokens, sampling, self.stop_ids, ends)
        return [cut_at(self.tokenizer.decode(tokens), stops) for tokens in found]
