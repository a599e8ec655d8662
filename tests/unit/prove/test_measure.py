"""The inputs of the plain loop for a micro-batch (megalite/prove/measure.py)."""

import pytest
import torch

from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.prove.measure import _document_mask, _inputs
from tests.small_models import MODELS

DOCUMENTS = torch.tensor([[0, 0, 1, 1]])
PREFIXES = torch.tensor([[True, False, True, True]])
APART = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
CAUSAL = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
PREFIXED = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("context", "causal", "wanted"),
    [
        (Context(documents=DOCUMENTS), False, APART),
        (Context(documents=DOCUMENTS), True, CAUSAL),
        (Context(documents=DOCUMENTS, prefixes=PREFIXES), True, PREFIXED),
    ],
)
def test_documents_are_kept_apart(context: Context, causal: bool, wanted: list[list[int]]) -> None:
    mask = _document_mask(context, causal)
    assert mask is not None and mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == wanted


def test_source_and_target_are_separate_inputs() -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    llama, t5 = read_spec(MODELS["llama"]), read_spec(MODELS["t5"])
    given = _inputs(tokens, Context(), llama)
    assert given["input_ids"] is tokens and given["attention_mask"] is None
    given = _inputs(tokens, Context(source=3, documents=torch.tensor([[0, 0, 1, 2]])), t5)
    assert given["input_ids"].tolist() == [[5, 6, 7]]
    assert given["attention_mask"].tolist() == [[1, 1, 0]]  # a padded source
    assert given["decoder_input_ids"].tolist() == [[8]]
