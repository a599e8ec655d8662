"""Dynamic rotary positions beyond the trained length: the base grows with the length of a token's own sequence, not of
others in the micro-batch."""

import pytest
import torch
from torch import Tensor

from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from tests.families import FAMILY_CONFIGS, VOCABULARY

LENGTH = 24
CONFIG = {
    **FAMILY_CONFIGS["llama"],
    "max_position_embeddings": 8,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}
LENGTHS = [[24], [3, 21], [5, 4, 15], [8, 8, 8], [12, 12], [9, 7, 1, 7]]
"""Of the documents of each row."""


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(read_spec(CONFIG), Grid()).initialise(seed=1).eval()


@torch.no_grad()
def logits(stage: Stage, tokens: Tensor, context: Context | None = None) -> Tensor:
    return stage(tokens, context=context)


def rows() -> tuple[Tensor, Tensor]:
    """Tokens and document numbers [6, LENGTH]."""
    tokens = torch.randint(
        0, VOCABULARY, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(1)
    )
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    return tokens, torch.stack(numbers).to(torch.int32)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_documents_kept_apart_do_not_depend_on_the_micro_batch(stage: Stage, micro: int) -> None:
    tokens, documents = rows()
    together = logits(stage, tokens, Context(documents=documents))
    parts = [
        logits(stage, tokens[i : i + micro], Context(documents=documents[i : i + micro]))
        for i in range(0, len(tokens), micro)
    ]
    torch.testing.assert_close(torch.cat(parts), together)


def test_a_document_kept_apart_is_as_if_it_were_alone(stage: Stage) -> None:
    tokens, documents = rows()
    together = logits(stage, tokens, Context(documents=documents))
    for row, lengths in enumerate(LENGTHS):
        for document, length in enumerate(lengths):
            here = documents[row] == document
            alone = logits(stage, tokens[row, here].unsqueeze(0))
            assert alone.shape[1] == length
            torch.testing.assert_close(together[row, here], alone[0])


def test_padded_rows_are_rotated_by_their_own_lengths(stage: Stage) -> None:
    tokens, _ = rows()
    lengths = torch.tensor([24, 5, 9, 8, 1, 20])
    filled = torch.where(torch.arange(LENGTH) < lengths.unsqueeze(-1), tokens, 0)
    together = logits(stage, filled, Context(lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = logits(stage, tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0])
