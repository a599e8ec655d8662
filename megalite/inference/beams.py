"""Beam search: keeps the `size` likeliest texts of each prompt, and extends all of them in each step.

As in transformers (`generate` with `num_beams`): a step considers the 2 · size likeliest continuations. Those among the
first `size` that end a text are set aside, scored by the mean log probability of their tokens, and the likeliest others
continue. A prompt is finished when `size` texts are set aside and no beam can be better than the worst of them, or at
the maximum length. P prompts, K beams, V / t logits of a rank. Next: generate.py.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.inference.sampling import likeliest
from megalite.parallel.collectives import max_over, sum_over
from megalite.parallel.grid import Axis

_NEVER = float("-inf")


@dataclass(frozen=True)
class Beams:
    """size: texts kept per prompt. length_penalty: a text's score is its log probability, divided by the number of its
    tokens to this power. Raises ConfigError for a value out of range."""

    size: int
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ConfigError(
                f"--beams: {self.size}: must be at least 2; leave it out for greedy decoding"
            )
        if not 0.0 <= self.length_penalty < float("inf"):
            rule = "must be a number of 0 or more"
            raise ConfigError(f"--length-penalty: {self.length_penalty}: {rule}")


class Hypotheses:
    """The texts of one prompt: live ones and those that are set aside."""

    def __init__(self, beams: Beams, max_new_tokens: int) -> None:
        self.beams, self.max_new_tokens = beams, max_new_tokens
        self.live: list[list[int]] = [[] for _ in range(beams.size)]
        # At first all rows hold only the prompt, so only one of them counts.
        self.scores = [0.0] + [_NEVER] * (beams.size - 1)
        self.parents = list(range(beams.size))
        """The beam that each live text continues."""
        self.ended: list[tuple[float, list[int], str]] = []
        """(score, tokens, reason of the end), best first."""

    def add(
        self,
        found: Sequence[Sequence[float]],
        stop_ids: Collection[int],
        ends: Callable[[list[int]], bool],
    ) -> None:
        """Adds a step. found: [log probability, beam, token] of the likeliest continuations, likeliest first."""
        size, length = self.beams.size, len(self.live[0]) + 1
        live: list[tuple[float, int, list[int]]] = []
        for rank, (score, beam, token) in enumerate(found):
            if score == _NEVER:
                continue
            tokens = [*self.live[int(beam)], int(token)]
            stops = int(token) in stop_ids or ends(tokens)
            if stops or length == self.max_new_tokens:
                if rank < size:
                    self.ended.append(
                        (score / self._weight(length), tokens, "stop" if stops else "length")
                    )
            elif len(live) < size:
                live.append((score, int(beam), tokens))
        # The sort is stable: among equal scores the older text stays.
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[:size]
        live += [(_NEVER, 0, [0] * length)] * (size - len(live))
        self.scores = [score for score, _, _ in live]
        self.parents = [beam for _, beam, _ in live]
        self.live = [tokens for _, _, tokens in live]

    def _weight(self, length: int) -> float:
        return length**self.beams.length_penalty

    @property
    def is_finished(self) -> bool:
        length = len(self.live[0])
        if length == self.max_new_tokens or max(self.scores) == _NEVER:
            return True
        full = len(self.ended) == self.beams.size
        return full and self.ended[-1][0] >= max(self.scores) / self._weight(length)

    @property
    def best(self) -> tuple[list[int], str]:
        """Tokens of the best text that has ended, and the reason."""
        _, tokens, why = self.ended[0]
        return tokens, why


def candidates(
    logits: Tensor, scores: Tensor, vocabulary_size: int, axis: Axis, size: int
) -> Tensor:
    """The 2K likeliest continuations of each prompt, fp64 [P, 2K, 3]: log probability, beam, token; the same on every
    rank of the axis (collective over it). logits [P·K, V / t]. scores [P·K]: log probabilities so far."""
    logits = logits.float()
    peak = max_over(logits.amax(dim=-1), axis)
    total = sum_over((logits - peak.unsqueeze(-1)).exp().sum(dim=-1), axis)
    found, ids = likeliest(logits, vocabulary_size, axis, 2 * size)  # [P·K, C]
    logarithms = found.double() - (peak + total.log()).double().unsqueeze(-1)
    sums = (scores.unsqueeze(-1) + logarithms).unflatten(0, (-1, size))  # [P, K, C]
    width = sums.shape[-1]
    flat = sums.flatten(1)
    missing = max(0, 2 * size - flat.shape[1])  # a tiny vocabulary
    flat = torch.nn.functional.pad(flat, (0, missing), value=_NEVER)
    tokens = torch.nn.functional.pad(ids.unflatten(0, (-1, size)).flatten(1), (0, missing))
    best, indices = flat.sort(dim=-1, descending=True, stable=True)
    best, indices = best[:, : 2 * size], indices[:, : 2 * size]
    beam = torch.div(indices, width, rounding_mode="floor").clamp(max=size - 1)
    return torch.stack([best, beam.double(), tokens.gather(-1, indices).double()], dim=-1)
