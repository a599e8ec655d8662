"""The embedding of a model (megalite/model/embedding.py), compared with torch's."""

from typing import Any

import torch
import torch.nn.functional as F

from megalite.model.context import Context
from megalite.model.embedding import Embedding
from megalite.model.families import read_spec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import initialise
from tests.families import FAMILY_CONFIGS, VOCABULARY


def embedding(name: str, **changes: Any) -> Embedding:
    made = Embedding(read_spec({**FAMILY_CONFIGS[name], **changes}), Split(ALONE))
    for number, value in enumerate(made.parameters()):
        value.data.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(number))
    return made


def test_learned_positions_are_added_from_the_start_of_each_document() -> None:
    made = embedding("gpt2")
    ids = torch.randint(0, VOCABULARY, (2, 5))
    assert made.positions is not None and made.types is None and made.norm is None
    tokens = made.tokens.weight[ids]
    torch.testing.assert_close(made(ids, Context()), tokens + made.positions[:5])
    apart = Context(documents=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
    places = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]])
    torch.testing.assert_close(made(ids, apart), tokens + made.positions[places])
    later = Context(positions=torch.tensor([[7], [9]]))
    wanted = tokens[:, :1] + made.positions[[7, 9]].unsqueeze(1)
    torch.testing.assert_close(made(ids[:, :1], later), wanted)


def test_padding_is_not_counted_and_its_place_has_no_gradient() -> None:
    """RoBERTa's positions start after the padding id, which is the position of padding itself."""
    padding = read_spec(FAMILY_CONFIGS["roberta"]).position_offset - 1
    made = embedding("roberta")
    ids = torch.tensor([[9, padding, 8, 9]])
    assert made.positions is not None and made.types is not None and made.norm is not None
    places = torch.tensor([[padding + 1, padding, padding + 2, padding + 3]])
    hidden = made.tokens.weight[ids] + made.positions[places] + made.types[0]
    wanted = F.layer_norm(
        hidden, hidden.shape[-1:], made.norm.weight, made.norm.bias, made.norm.eps
    )
    found = made(ids, Context())
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert made.positions.grad is not None and not made.positions.grad[padding].any()
    assert made.positions.grad[padding + 1].any()


def test_a_part_of_the_sequence_has_its_own_positions() -> None:
    """With sequence parallelism each tensor rank takes its rows of the whole sequence."""
    spec, ids = read_spec(FAMILY_CONFIGS["gpt2"]), torch.randint(0, VOCABULARY, (1, 6))
    parts = []
    for rank in range(2):
        made = Embedding(spec, Split(Axis(2, rank, (0, 1), None), sequence=True))
        initialise(made, 1)
        assert made.positions is not None
        rows = made.split.rows(6)
        parts.append(made._of_positions(made.positions, ids, Context(), rows))
        torch.testing.assert_close(parts[-1][0], made.positions[rows.start : rows.stop])
    assert torch.cat(parts, dim=1).shape == (1, 6, spec.hidden_size)
