"""Code shared by the contenders (megalite/races/plain.py, stages.py, loader_race.py, machine_line.py)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megalite.data.indexed import IndexedCorpus
from megalite.races.loader_race import write_random_corpus
from megalite.races.machine_line import machine_line
from megalite.races.plain import adam, batches, groups, load_model, plain_step
from megalite.races.stages import PeerStage
from tests.families import FAMILY_CONFIGS, hf_model

PLAIN = {key: value for key, value in FAMILY_CONFIGS["llama"].items() if key != "pad_token_id"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("peers")
    hf_model(PLAIN).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 131, (2, 4, 9)))
    return {
        "model": str(folder / "model"), "tokens": str(folder / "tokens.npy"), "micro": 4, "bf16": False,
        "clipping": 0.5, "learning_rate": 1e-2, "weight_decay": 0.1,
    }  # fmt: skip


def trained(asked: dict[str, Any]) -> tuple[list[float], list[torch.Tensor]]:
    model, batch = load_model(asked), batches(asked)
    optimizer = adam(model.parameters(), asked)
    losses = [plain_step(model, optimizer, asked, *batch(step)) for step in range(2)]
    return losses, [value.detach() for value in model.parameters()]


def test_a_step_does_not_depend_on_the_micro_batch(asked: dict[str, Any]) -> None:
    """Except for rounding, which Adam amplifies if a gradient is nearly 0."""
    start = [value.detach() for value in load_model(asked).parameters()]
    whole, parts = trained(asked), trained({**asked, "micro": 1})
    assert parts[0] == pytest.approx(whole[0], rel=1e-4)

    def distance(others: list[torch.Tensor]) -> float:
        pairs = zip(whole[1], others, strict=True)
        return sum((one - other).square().sum().item() for one, other in pairs) ** 0.5

    assert distance(parts[1]) < 0.01 * distance(start)


def test_labels_are_the_tokens_that_follow(asked: dict[str, Any]) -> None:
    tokens, labels = batches(asked)(1)
    assert tokens.shape == labels.shape == (4, 8)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])


def test_matrices_decay_and_norms_do_not(asked: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    matrices, others = groups(module.parameters(), asked)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [value.dim() for value in matrices["params"]] == [2]
    assert [value.dim() for value in others["params"]] == [1, 1, 1]


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_two_stages_are_the_model(asked: dict[str, Any], cut: int) -> None:
    model, (tokens, _) = load_model(asked).eval(), batches(asked)(0)
    first, last = PeerStage(model, True, cut), PeerStage(model, False, cut)
    with torch.no_grad():
        torch.testing.assert_close(last(first(tokens)), model(tokens).logits)


def test_a_corpus_of_random_ids(tmp_path: Path) -> None:
    write_random_corpus(tmp_path / "corpus", 10_000, 100, vocabulary=50)
    corpus = IndexedCorpus(tmp_path / "corpus")
    corpus.check_index()
    assert corpus.num_documents == 100
    assert 8_000 < corpus.num_tokens < 12_000 and len(np.unique(corpus.tokens)) == 50


def test_the_machines_line_names_what_figures_depend_on() -> None:
    line = machine_line()
    assert re.match(r"^\d+ cores of .+ \(.*\), load \d+\.\d, torch \S+, deepspeed \S+, trans", line)
