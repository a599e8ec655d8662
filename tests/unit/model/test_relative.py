"""Relative positions (megalite/model/relative.py), compared with transformers' T5."""

import math

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.relative import (
    RelativeBias,
    attend_biased,
    buckets_of,
    cross_bias,
    source_visible,
    taking_part,
)
from megalite.parallel.grid import ALONE
from tests.families import FAMILY_CONFIGS

SPEC = read_spec(FAMILY_CONFIGS["t5"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (9, 7), (8, 6), (4, 100)])
def test_buckets_are_those_of_transformers(causal: bool, buckets: int, most: int) -> None:
    distances = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distances, not causal, buckets, most)
    assert torch.equal(buckets_of(distances, causal, buckets, most), theirs)


def table(causal: bool) -> RelativeBias:
    made = RelativeBias(SPEC, ALONE, causal)
    made.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_is_that_of_the_distance(causal: bool) -> None:
    made, visible = table(causal), torch.ones(2, 1, 1, 6, dtype=torch.bool)
    visible[1, ..., 4:] = False
    bias = made(3, 6, visible, torch.device("cpu"))  # the last 3 of 6 positions
    assert bias.shape == (2, SPEC.num_heads, 3, 6)
    for sample in range(2):
        for query in range(3):
            for key in range(6):
                distance = torch.tensor(key - (query + 3))
                hidden = (causal and key > query + 3) or (sample == 1 and key > 3)
                row = buckets_of(distance, causal, made.stacks.buckets, made.stacks.max_distance)
                found, wanted = bias[sample, :, query, key], made.weight[row]
                assert (found == -math.inf).all() if hidden else torch.equal(found, wanted)


def test_padding_of_a_source_is_not_attended_to() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 1]])
    found = source_visible(Context(documents=documents, source=4))
    assert found is not None
    assert found[:, 0, 0].tolist() == [[True, True, False, False], [True] * 4]
    assert source_visible(Context(source=4)) is None and cross_bias(None, torch.float32) is None
    bias = cross_bias(found, torch.bfloat16)
    assert bias is not None and bias.dtype == torch.bfloat16
    assert bias[0, 0, 0].tolist() == [0.0, 0.0, -math.inf, -math.inf] and not bias[1].any()


def test_explicit_attention_equals_the_kernels() -> None:
    """A bias that needs a gradient is added explicitly on a CPU; dropout divides by the share that is kept."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, 4, 8, generator=generator) for _ in range(3))
    bias = torch.randn(1, 3, 4, 4, generator=generator)
    kernel = attend_biased(q, k, v, bias, None, 0.0)
    torch.testing.assert_close(attend_biased(q, k, v, bias.requires_grad_(), None, 0.0), kernel)
    weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
    torch.testing.assert_close(kernel, weights.detach() @ v)
    drops = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    drops[..., 1] = True
    dropped = attend_biased(q, k, v, bias, drops, 0.2)
    torch.testing.assert_close(dropped, weights.masked_fill(drops, 0.0) / 0.8 @ v)


def test_a_stage_without_a_layer_that_reads_a_table_gives_it_zeros() -> None:
    hidden, tables = torch.randn(2, 3, requires_grad=True), [table(True), table(False)]
    taking_part(hidden, tables).sum().backward()
    assert hidden.grad is not None and (hidden.grad == 1).all()
    for made in tables:
        assert made.weight.grad is not None and not made.weight.grad.any()
        assert made.weight.grad.shape == made.weight.shape
    assert taking_part(hidden, []) is hidden
