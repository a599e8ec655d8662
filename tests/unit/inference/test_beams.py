"""Beam search without a model (megalite/inference/beams.py), compared with an exhaustive search."""

import math
from itertools import product

import pytest
import torch

from megalite.errors import ConfigError
from megalite.inference.beams import Beams, Hypotheses, candidates
from megalite.parallel.grid import ALONE

STOP, VOCABULARY, LENGTH = 0, 4, 4


def logits_after(tokens: tuple[int, ...]) -> torch.Tensor:
    """A model whose next token depends on the text so far."""
    seed = sum((token + 1) * 7**place for place, token in enumerate(tokens))
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def score(tokens: tuple[int, ...], penalty: float) -> float:
    parts = [
        logits_after(tokens[:place]).double().log_softmax(0)[token].item()
        for place, token in enumerate(tokens)
    ]
    return sum(parts) / len(tokens) ** penalty


def searched(size: int, penalty: float) -> tuple[list[int], str]:
    texts = Hypotheses(Beams(size, penalty), LENGTH)
    while not texts.is_finished:
        logits = torch.stack([logits_after(tuple(text)) for text in texts.live])
        sums = torch.tensor(texts.scores, dtype=torch.float64)
        found = candidates(logits, sums, VOCABULARY, ALONE, size)
        texts.add(found[0].tolist(), {STOP}, lambda tokens: False)
    return texts.best


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_as_many_beams_as_texts_find_the_best_one(penalty: float) -> None:
    """Among all texts that end with the stop token or at the maximum length."""
    texts = [
        tokens
        for length in range(1, LENGTH + 1)
        for tokens in product(range(VOCABULARY), repeat=length)
        if STOP not in tokens[:-1] and (tokens[-1] == STOP or length == LENGTH)
    ]
    best = max(texts, key=lambda tokens: score(tokens, penalty))
    why = "stop" if best[-1] == STOP else "length"
    assert searched(VOCABULARY**LENGTH, penalty) == (list(best), why)


def test_candidates_are_the_likeliest_sums_in_order() -> None:
    """Two prompts with three beams each; a beam that does not count gives no candidates."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, VOCABULARY, generator=generator)
    scores = torch.tensor([-1.0, -2.0, -math.inf, -0.5, -0.6, -0.7], dtype=torch.float64)
    found = candidates(logits, scores, VOCABULARY, ALONE, 3)
    assert found.shape == (2, 6, 3) and found.dtype == torch.float64
    every = scores.unsqueeze(-1) + logits.double().log_softmax(-1)
    for prompt, rows in enumerate(found):
        own = every[3 * prompt : 3 * prompt + 3]
        wanted = own.flatten().sort(descending=True).values[:6]
        torch.testing.assert_close(rows[:, 0], wanted, rtol=1e-5, atol=1e-6)
        for total, beam, token in rows.tolist():
            if total > -math.inf:
                assert own[int(beam), int(token)].item() == pytest.approx(total, abs=1e-5)


def test_a_vocabulary_of_few_tokens_is_filled_up() -> None:
    found = candidates(torch.zeros(5, 2), torch.zeros(5, dtype=torch.float64), 2, ALONE, 5)
    assert found.shape == (1, 10, 3) and found.isfinite().all()
    one = candidates(torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64), 1, ALONE, 1)
    assert one.tolist() == [[[0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]]]


def test_only_ends_among_the_first_beams_are_set_aside() -> None:
    texts = Hypotheses(Beams(2, 1.0), max_new_tokens=9)
    texts.add([[-0.1, 0, 5], [-0.2, 0, 6], [-0.3, 0, STOP], [-0.4, 0, 7]], {STOP}, lambda _: False)
    assert texts.live == [[5], [6]] and texts.ended == [] and texts.parents == [0, 0]
    texts.add([[-0.3, 1, STOP], [-0.5, 1, 8], [-0.6, 0, 9], [-0.7, 0, 1]], {STOP}, lambda _: False)
    assert texts.live == [[6, 8], [5, 9]] and texts.parents == [1, 0]
    assert texts.ended == [(-0.15, [6, STOP], "stop")] and not texts.is_finished
    # Two are set aside, and no continued text can be better than the worse of them.
    texts.add([[-0.6, 0, STOP], [-0.7, 1, 3]], {STOP}, lambda _: False)
    assert [tokens for _, tokens, _ in texts.ended] == [[6, STOP], [6, 8, STOP]]
    assert texts.is_finished and texts.best == ([6, STOP], "stop")


def test_a_text_that_the_caller_ends_is_set_aside_too() -> None:
    texts = Hypotheses(Beams(2), max_new_tokens=9)
    texts.add([[-0.1, 0, 5], [-0.2, 0, 6]], (), lambda tokens: tokens == [5])
    assert texts.ended == [(-0.1, [5], "stop")] and texts.live[0] == [6]


@pytest.mark.parametrize(
    ("size", "penalty", "line"),
    [
        (1, 1.0, "--beams: 1: must be at least 2"),
        (2, -0.1, "--length-penalty: -0.1: must be a number of 0 or more"),
        (2, math.inf, "--length-penalty: inf: "),
        (2, math.nan, "--length-penalty: nan: "),
    ],
)
def test_a_value_out_of_range_is_one_line(size: int, penalty: float, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Beams(size, penalty)
