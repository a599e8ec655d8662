"""The head of a classifier (megalite/model/classifier.py): packed texts compared with the same texts one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.model.classifier import Classifier, _last_positions, _texts_of_tokens
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE, Axis
from tests.classifiers import CONFIGS, LABELS, LENGTHS, batch

POOLING = {"modernbert, mean": "mean", "llama": "last", "bert": "first"}


def head(name: str) -> Classifier:
    made = Classifier(read_spec(CONFIGS[name]), Split(ALONE))
    generator = torch.Generator().manual_seed(1)
    for value in made.parameters():
        value.data.normal_(0.0, 0.3, generator=generator)
    return made


def hidden_of(made: Classifier) -> Tensor:
    shape = len(LENGTHS), 12, made.output.weight.shape[1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", POOLING)
def test_packed_texts_are_classified_as_one_by_one(name: str) -> None:
    made, (_, labels, context) = head(name), batch()
    hidden = hidden_of(made)
    apart: list[Tensor] = []
    for row, lengths in zip(hidden, LENGTHS, strict=True):
        start = 0
        for length in lengths:
            apart.append(made(row[None, start : start + length], None, Context()))
            start += length
    logits, wanted = torch.cat(apart), labels.flatten()[labels.flatten() != -100]
    loss = made(hidden, labels, context)
    torch.testing.assert_close(loss, F.cross_entropy(logits, wanted, reduction="sum"))
    # If the host does not know which labels count, all positions are classified, most of which do not count.
    torch.testing.assert_close(made(hidden, labels, Context(documents=context.documents)), loss)


@pytest.mark.parametrize("name", POOLING)
def test_the_state_is_that_of_the_pooling(name: str) -> None:
    made = head(name)
    hidden = hidden_of(made)[:1]
    seen = made.norm(hidden) if made.norm is not None else hidden
    states = {"mean": seen.mean(1), "last": seen[:, -1], "first": seen[:, 0]}
    pooled = states[POOLING[name]]
    if made.dense is not None:
        pooled = torch.tanh(made.dense(pooled))
    if made.transform is not None:
        pooled = made.transform(pooled)
    torch.testing.assert_close(made(hidden, None, Context()), made.output(pooled))


def test_an_evaluation_counts_labels_and_answers() -> None:
    made, (_, labels, context) = head("bert"), batch()
    made.eval()
    hidden = hidden_of(made)
    loss, *table = made(hidden, labels, context).tolist()
    counts = torch.tensor(table).view(len(LABELS), len(LABELS))
    wanted = labels.flatten()[labels.flatten() != -100]
    assert counts.sum() == len(wanted) == 6
    assert counts.sum(1).tolist() == torch.bincount(wanted, minlength=3).tolist()
    made.train()
    assert loss == pytest.approx(made(hidden, labels, context).item())


def test_ranks_that_divide_the_sequence_add_up_to_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank gives its part of a text, and zeros for the parts of other ranks."""
    _, _, context = batch()
    assert context.counted is not None
    for name in POOLING:
        spec = read_spec(CONFIGS[name])
        whole = Classifier(spec, Split(ALONE))
        hidden = hidden_of(whole)
        parts: list[Tensor] = []
        for rank in range(3):
            divided: Any = Classifier(spec, Split(Axis(3, rank, (0, 1, 2), None), sequence=True))
            monkeypatch.setattr(divided, "_gathered", lambda part: part)
            own = hidden[:, 4 * rank : 4 * rank + 4]
            parts.append(divided._pooled(own, context.counted, 12, context))
        wanted = whole._pooled(hidden, context.counted, 12, context)
        torch.testing.assert_close(torch.stack(parts).sum(0), wanted)


def test_where_texts_begin_and_end() -> None:
    context = Context(documents=torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]))
    number, tokens = _texts_of_tokens(2, 4, context, torch.device("cpu"))
    assert number.tolist() == [[0, 0, 1, 1], [2, 3, 4, 4]]
    assert tokens[:5].tolist() == [2, 2, 1, 1, 2]
    last = _last_positions(2, 4, context, torch.device("cpu"))
    assert last.tolist() == [1, 1, 3, 3, 4, 5, 7, 7]
