"""Generation and evaluation on any layout, compared with transformers' own and with one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.saved_bias import set_router_bias
from megalite.checkpoint.weights import load_module
from megalite.errors import ConfigError
from megalite.hub.hf_folder import HFFolder
from megalite.inference.evaluate import Score, evaluate
from megalite.inference.generate import Generator, Text, check_lengths
from megalite.inference.likelihood import Likelihood, likelihoods
from megalite.inference.sampling import Sampling, choose
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import ALONE, Axis, Grid
from megalite.parallel.layers import share
from megalite.pipeline.pipeline_plan import inference_cut
from tests.families import FAMILY_CONFIGS, VOCABULARY, hf_model
from tests.ranks import run_ranks

# Long enough for the texts below.
CONFIGS = {
    name: {**config, "max_position_embeddings": 16} if "n_positions" not in config else config
    for name, config in FAMILY_CONFIGS.items()
    if read_spec(config).causal and read_spec(config).stacks is None
}
PROMPTS = [
    [5, 9, 3],
    [77],
    [11, 12, 13, 14, 15, 16, 17, 18],
    [130, 0, 64, 2, 5],
    [40, 41],
    [8, 7, 6, 5],
]
NEW = 7
# Marked tokens of each prompt: from a position on, or some in between.
ROWS = [
    (prompt, [0] * (len(prompt) // 2) + [1] * (len(prompt) - len(prompt) // 2))
    for prompt in PROMPTS
]
ROWS += [([9, 8, 7, 6, 5, 4], [0, 1, 0, 0, 1, 0]), ([3, 4], [1, 1])]
SAMPLED = Sampling(
    temperature=1.3, top_k=20, top_p=0.95, seed=3, repetition_penalty=1.3, min_p=0.02
)
PENALISED = Sampling(repetition_penalty=1.7)


HELD = [[3], [0], [3, 0, 3], [5, 3]]  # tokens of rows whose logits are penalised


class Windows:
    """Samples by position; each can be made independently."""

    count = 11

    def batch(self, positions: Any) -> Any:
        generators = [torch.Generator().manual_seed(position) for position in positions]
        ids = torch.stack([torch.randint(0, VOCABULARY, (14,), generator=g) for g in generators])
        labels = ids[:, 1:].clone()
        labels[:, 3] = -100
        return ids[:, :-1].numpy(), labels.numpy(), None


def on_a_grid(
    rank: int, world_size: int, pipe: int, tensor: int, folders: list[Path]
) -> list[tuple[list[Text], list[Text], Score, list[tuple[int, int]], list[Likelihood]]]:
    grid = Grid.build(pipe, tensor)
    results = []
    for path in folders:
        folder = HFFolder(path)
        stage = Stage(folder.spec, grid, inference_cut(folder.spec, grid.pipe.size))
        load_module(folder.read, stage)
        set_router_bias(stage, folder.state, torch.device("cpu"))
        generator, told = Generator(stage, grid, batch_size=4), []
        greedy = generator.generate(
            PROMPTS, NEW, stop_ids=[2], on_token=lambda n, t, told=told: told.append((n, t))
        )
        sampled = generator.generate(PROMPTS[3:], NEW, SAMPLED, numbers=[3, 4, 5])
        sampled += generator.generate(PROMPTS, NEW, PENALISED, stop_ids=[2])
        score = evaluate(stage, grid, Windows(), Windows.count, 13, micro=2)
        # Including each greedily chosen text, whose tokens are known to be the likeliest.
        rows = [
            *ROWS,
            *((t.prompt + t.tokens, [0] * len(t.prompt) + [1] * len(t.tokens)) for t in greedy[:2]),
        ]
        results.append((greedy, sampled, score, told, likelihoods(stage, grid, rows, batch_size=3)))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = {}
    for name, config in CONFIGS.items():
        result[name] = tmp_path_factory.mktemp("model")
        hf_model(config).save_pretrained(result[name])
    return result


@pytest.fixture(scope="module")
def one_rank(folders: dict[str, Path]) -> dict[str, Any]:
    return dict(zip(folders, run_ranks(1, on_a_grid, 1, 1, list(folders.values()))[0], strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_loss_are_those_of_transformers(
    name: str, one_rank: dict[str, Any]
) -> None:
    model = hf_model(CONFIGS[name])
    greedy, sampled, score, told, likely = one_rank[name]
    for text, penalised in zip(greedy, sampled[3:], strict=True):
        ids = torch.tensor([text.prompt])
        # Otherwise transformers takes tokens equal to the padding id for padding.
        mask = torch.ones_like(ids)
        told_to = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        wanted = model.generate(ids, attention_mask=mask, **told_to)[0, ids.shape[1] :].tolist()
        assert text.tokens == wanted
        assert text.finished == ("stop" if wanted[-1] == 2 else "length")
        assert [token for number, token in told if number == text.number] == wanted
        told_to["repetition_penalty"] = PENALISED.repetition_penalty
        wanted = model.generate(ids, attention_mask=mask, **told_to)[0, ids.shape[1] :].tolist()
        assert penalised.tokens == wanted
    assert [text.tokens for text in greedy] != [text.tokens for text in sampled[3:]]
    tokens, labels = (torch.from_numpy(part) for part in Windows().batch(range(Windows.count))[:2])
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert score.loss == pytest.approx(loss, rel=1e-6) and score.tokens == 12 * Windows.count
    for found, (ids, marks) in zip(likely, ROWS, strict=False):
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        places = torch.tensor(marks[1:]).nonzero()[:, 0]
        wanted = torch.tensor(ids[1:], dtype=torch.int64)[places]
        assert found.log_probability == pytest.approx(
            logits[places, wanted].sum().item(), rel=1e-5, abs=1e-6
        )
        assert found.greedy == bool((logits[places].argmax(-1) == wanted).all())
    assert [found.greedy for found in likely[-2:]] == [True, True] and not likely[0].greedy


@pytest.mark.parametrize(
    ("pipe", "tensor", "data", "every"),
    [(2, 2, 1, 1), (3, 1, 1, 1), (1, 2, 2, 5), pytest.param(1, 2, 2, 1, marks=pytest.mark.long)],
)
def test_a_layout_gives_the_same_texts_and_loss(
    pipe: int,
    tensor: int,
    data: int,
    every: int,
    folders: dict[str, Path],
    one_rank: dict[str, Any],
) -> None:
    """every: the stride through the families; nothing of a family depends on the data axis."""
    some = list(folders)[::every]
    paths = [folders[name] for name in some]
    for results in run_ranks(pipe * tensor * data, on_a_grid, pipe, tensor, paths):
        for (greedy, sampled, score, told, likely), name in zip(results, some, strict=True):
            wanted = one_rank[name]
            assert (greedy, sampled) == wanted[:2] and sorted(told) == sorted(wanted[3])
            assert (
                score.loss == pytest.approx(wanted[2].loss, rel=1e-6)
                and score.tokens == wanted[2].tokens
            )
            for found, expected in zip(likely, wanted[4], strict=True):
                assert found.log_probability == pytest.approx(
                    expected.log_probability, rel=1e-5, abs=1e-6
                )
                assert found.greedy == expected.greedy


def test_sampling_follows_its_settings() -> None:
    """Compared with the distribution itself; the draws are the same for any tensor axis."""
    logits = torch.tensor([2.0, 1.0, 1.0, 3.0, -1.0, 0.0, 2.5])
    rows = 4000

    def shares(sampling: Sampling) -> Tensor:
        drawn = choices(logits, sampling, rows, ALONE)
        return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / rows

    def wanted(allowed: list[int], temperature: float) -> Tensor:
        kept = torch.full_like(logits, -torch.inf)
        kept[allowed] = logits[allowed] / temperature
        return kept.softmax(-1)

    everything = list(range(7))
    for sampling, expected in (
        (Sampling(1.0), wanted(everything, 1.0)),
        (Sampling(2.0, seed=9), wanted(everything, 2.0)),
        (Sampling(1.0, top_k=3), wanted([0, 3, 6], 1.0)),
        (Sampling(1.0, top_k=4), wanted([0, 1, 3, 6], 1.0)),  # ties: the lower id
        (Sampling(1.0, top_p=0.6), wanted([3, 6], 1.0)),
        (Sampling(1.0, top_p=0.01), wanted([3], 1.0)),
        (Sampling(1.0, min_p=0.3), wanted([0, 3, 6], 1.0)),
        (Sampling(1.0, min_p=1.0), wanted([3], 1.0)),
        (Sampling(1.0, top_k=2, min_p=0.1), wanted([3, 6], 1.0)),
    ):
        assert (shares(sampling) - expected).abs().max() < 0.03
        assert ((shares(sampling) > 0) == (expected > 0)).all()
    assert choices(logits, Sampling(), 2, ALONE) == [3, 3]
    assert choices(logits, Sampling(1.0, seed=1), 50, ALONE) != choices(
        logits, Sampling(1.0, seed=2), 50, ALONE
    )
    cases = [
        Sampling(), Sampling(1.0), Sampling(1.0, top_k=4), Sampling(0.7, top_p=0.9, top_k=6),
        Sampling(repetition_penalty=2.0), Sampling(1.2, repetition_penalty=1.5, min_p=0.05, top_p=0.95),
    ]  # fmt: skip
    # In rows that contain 3, the likeliest, its logit of 3.0 becomes 1.5, below the 2.5 of 6.
    assert choices(logits, cases[4], 4, ALONE) == [6, 3, 6, 6]
    for result in run_ranks(3, chosen, logits, cases, 100):
        assert result == [choices(logits, case, 100, ALONE) for case in cases]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"temperature": -1.0}, "--temperature: -1.0: must be"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k: 0: must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p: 0.0: must be"),
        ({"top_k": 3}, "--temperature: 0: must be above 0 with --top-k"),
        ({"min_p": 0.1}, "--temperature: 0: must be above 0 with --top-k, --top-p or --min-p"),
        ({"temperature": 1.0, "min_p": 1.5}, "--min-p: 1.5: must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: 0.0: must be a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Sampling(**values)


def test_lengths_that_do_not_fit_are_refused() -> None:
    spec = read_spec(CONFIGS["llama"])
    cases = (
        ([[1], []], 3, "prompt 1: is empty"),
        ([[1] * 14], 3, "14 tokens"),
        ([[1]], 0, "0: must"),
    )
    for prompts, count, line in cases:
        with pytest.raises(ConfigError, match=line):
            check_lengths(spec, prompts, count)


def chosen(
    rank: int, world_size: int, logits: Tensor, cases: list[Sampling], rows: int
) -> list[list[int]]:
    axis = Grid.build(1, world_size).tensor
    return [choices(logits, sampling, rows, axis) for sampling in cases]


def choices(logits: Tensor, sampling: Sampling, rows: int, axis: Axis) -> list[int]:
    start, stop = share(len(logits), axis)
    part = logits[start:stop].expand(rows, -1)
    places = [(row, 0) for row in range(rows)]
    held = [HELD[row % len(HELD)] for row in range(rows)]
    return choose(part, len(logits), axis, sampling, places, held).tolist()
