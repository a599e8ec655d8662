"""Options that change memory or the function, each the same on every layout: sequence parallelism, dropout, documents,
activation checkpointing, the loss in chunks; and the norm's memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.engine.norm import BLOCK, fused_squares_of, squares, squares_of
from megalite.model.context import Context
from megalite.model.dropout import Randomness, dropped
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import ALONE, Grid
from megalite.parallel.layers import share
from megalite.parallel.loss import AT_A_TIME_ON_DEVICES, block_rows, head_loss
from megalite.pipeline.pipeline_plan import inference_cut
from tests.allocations import peak_bytes
from tests.families import (
    FAMILY_CONFIGS,
    FEW_KV_HEADS,
    VOCABULARY,
    Result,
    forward_backward,
    full_gradients,
)
from tests.ranks import run_ranks

LENGTH = 12
_DROPS = {
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
    "llama": {"attention_dropout": 0.2},
}
_DROPS |= {"gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}}
DROPPING = {name: {**FAMILY_CONFIGS[name], **rates} for name, rates in _DROPS.items()}
Case = tuple[dict[str, Any], dict[str, Any], bool]
"""A model, the options of its stage, and whether its samples are packed documents."""
CASES: list[Case] = [
    *(
        (FAMILY_CONFIGS[name], {"sequence": True}, False)
        for name in ("gpt2", "qwen3", "olmo2", "phi", "gpt_neox")
    ),
    *((config, {"sequence": True}, False) for config in DROPPING.values()),
    *((config, {"recompute": 1}, False) for config in DROPPING.values()),
    (DROPPING["gpt2"], {"recompute": "selective", "sequence": True}, True),
    (FAMILY_CONFIGS["qwen2"], {"recompute": 2, "z_loss": 0.01}, True),
]


def samples(count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and documents [count, LENGTH]."""
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    documents = (torch.rand(count, LENGTH, generator=generator) < 0.3).long().cumsum(1)
    return ids[:, :-1].contiguous(), labels, documents


def run(stage: Stage, packed: bool, rows: slice) -> Result:
    tokens, labels, documents = samples()
    randomness = Randomness(seed=3, step=5, samples=torch.arange(100, 104)[rows])
    context = Context(randomness=randomness, documents=documents[rows] if packed else None)
    return forward_backward(stage, tokens[rows], labels[rows], context)


def on_a_grid(
    rank: int, world_size: int, pipe: int, tensor: int, cases: list[Case]
) -> list[Result]:
    grid = Grid.build(pipe, tensor)
    results = []
    for config, options, packed in cases:
        spec = read_spec(config)
        stage = Stage(spec, grid, inference_cut(spec, pipe), **options).initialise(1)
        # Two micro-batches add their gradients.
        halves = [run(stage, packed, slice(i, i + 2)) for i in (0, 2)]
        results.append((halves[1][0], halves[0][1] + halves[1][1], halves[1][2]))
    return results


def check(results: list[list[Result]], cases: list[Case]) -> None:
    for number, (config, options, packed) in enumerate(cases):
        one = Stage(read_spec(config), Grid(), z_loss=options.get("z_loss", 0.0)).initialise(1)
        logits, loss, _ = wanted = run(one, packed, slice(0, 4))
        ours = [result[number] for result in results]
        assert max(value for _, value, _ in ours) == pytest.approx(loss, rel=1e-5)
        parts = [part for part, _, _ in ours if part is not None]
        assert logits is not None
        if (
            one.spec.dropout == 0
        ):  # otherwise the first stage's output is that of training, and one rank's logits are not
            torch.testing.assert_close(torch.cat(parts, dim=-1), logits[2:], rtol=1e-5, atol=1e-5)
        expected = full_gradients([wanted])
        for name, value in full_gradients(ours).items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-4, atol=1e-4, msg=f"{number} {name}"
            )


def test_levers_change_nothing_on_pipe_2_tensor_2() -> None:
    check(run_ranks(4, on_a_grid, 2, 2, CASES), CASES)


def test_sequence_parallelism_with_copies_of_key_value_heads() -> None:
    cases: list[Case] = [(config, {"sequence": True}, False) for config in FEW_KV_HEADS]
    check(run_ranks(4, on_a_grid, 1, 4, cases), cases)


def test_dropout_acts_in_training_alone_and_hangs_on_step_and_sample() -> None:
    tokens, labels, _ = samples()
    stage = Stage(read_spec(DROPPING["gpt2"]), Grid()).initialise(1)

    def loss(step: int, first: int) -> float:
        randomness = Randomness(3, step, torch.arange(first, first + 4))
        return stage(tokens, labels, Context(randomness=randomness)).item()

    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(2, 0), loss(1, 4)}) == 3
    plain = stage.eval()(tokens, labels).item()
    assert loss(1, 0) == plain
    with torch.no_grad():
        assert stage.train()(tokens, labels).item() == pytest.approx(plain)
    with pytest.raises(AssertionError, match="dropout needs randomness"):
        stage(tokens, labels)


def test_the_generator_is_splitmix64_and_any_part_of_a_mask_is_part_of_the_whole() -> None:
    randomness = Randomness(7, 11, torch.tensor([5, 2**40]))
    whole = dropped(randomness, "x", 0.3, [range(300), range(400)])
    assert abs(whole.float().mean().item() - 0.3) < 0.004
    assert abs((whole[0] == whole[1]).float().mean().item() - 0.58) < 0.01
    assert torch.equal(
        dropped(randomness, "x", 0.3, [range(17, 40), range(3, 90)]), whole[:, 17:40, 3:90]
    )
    assert not torch.equal(dropped(randomness, "y", 0.3, [range(300), range(400)]), whole)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mistral"])
def test_packed_documents_equal_separate_ones(name: str) -> None:
    stage = Stage(read_spec(FAMILY_CONFIGS[name]), Grid()).initialise(1)
    tokens, _, documents = samples(2)
    packed = stage(tokens, None, Context(documents=documents))
    for row in range(2):
        for document in documents[row].unique():
            where = documents[row] == document
            alone = stage(tokens[row : row + 1, where])
            torch.testing.assert_close(packed[row, where], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_loss_in_chunks_equals_torch(
    z_loss: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8), torch.randn(33, 8)
    bias, labels = torch.randn(33), torch.randint(0, 33, (3, 5))
    labels[0, 2:4] = -100
    inputs = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    logits = F.linear(*inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected = expected + z_loss * (logits.logsumexp(-1).square() * (labels != -100)).sum()
    (expected * 3).backward()
    ours = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    monkeypatch.setattr("megalite.parallel.loss.chunk_rows", lambda *sizes: rows)
    monkeypatch.setattr("megalite.parallel.loss.IN_CACHE", 2 * 33)
    loss = head_loss(*ours, labels, 33, ALONE, z_loss)
    (loss * 3).backward(retain_graph=True)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(ours, inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(
        RuntimeError, match="modified by an inplace operation"
    ):  # forward's gradients are given away
        loss.backward()


def test_the_loss_in_evaluation_has_no_z_loss_and_makes_no_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 8), nn.Parameter(torch.randn(9000, 8))
    labels = torch.randint(0, 9000, (50,))
    with torch.no_grad():
        expected = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        torch.testing.assert_close(
            head_loss(hidden, weight, None, labels, 9000, ALONE, z_loss=0.1), expected
        )
        held = peak_bytes(lambda: head_loss(hidden, weight, None, labels, 9000, ALONE))
    assert held < 1.1 * 4 * 9000 * 50  # the logits


@pytest.mark.parametrize("counted", [0, 1, 40])
def test_labels_that_do_not_count_cost_nothing(counted: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(60, 8), torch.randn(3000, 8)
    labels = torch.full((60,), -100)
    labels[torch.randperm(60)[:counted]] = torch.randint(0, 3000, (counted,))
    ours, theirs = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    losses = []

    def work() -> None:
        losses.append(head_loss(*ours, None, labels, 3000, ALONE))
        losses[0].backward()

    held = peak_bytes(work)
    assert held < 4 * (3000 * (counted + 8 + 1) + 4 * 60 * 8) + 4096  # logits, gradients
    expected = F.cross_entropy(F.linear(*theirs), labels, reduction="sum")
    expected.backward()
    torch.testing.assert_close(losses[0], expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_in_16_bits_is_as_near_as_they_allow(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    values = [torch.randn(90, 16).to(dtype), torch.randn(5000, 16).to(dtype)]
    labels = torch.randint(0, 5000, (90,))
    wide = [value.float().requires_grad_() for value in values]
    expected = F.cross_entropy(F.linear(*wide), labels, reduction="sum")
    expected.backward()
    monkeypatch.setattr("megalite.parallel.loss.chunk_rows", lambda *sizes: rows)
    ours = [value.requires_grad_() for value in values]
    loss = head_loss(*ours, None, labels, 5000, ALONE)
    loss.backward()
    rounding = torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(expected.item(), rel=rounding)
    for a, b in zip(ours, wide, strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
        assert (a.grad - b.grad).norm() < rounding * b.grad.norm()


def test_the_loss_makes_the_gradients_that_are_wanted_alone() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(20, 8), torch.randn(50, 8), torch.randn(50)
    labels = torch.randint(0, 50, (20,))
    whole = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    head_loss(*whole, labels, 50, ALONE).backward()
    for number in range(3):
        some = [
            value.clone().requires_grad_(i == number)
            for i, value in enumerate((hidden, weight, bias))
        ]
        loss = head_loss(*some, labels, 50, ALONE)
        assert [value is not None for value in loss.grad_fn.saved_tensors] == [
            i == number for i in range(3)
        ]
        loss.backward()
        assert torch.equal(some[number].grad, whole[number].grad)  # type: ignore[arg-type]


def test_the_loss_never_holds_the_logits_of_all_tokens() -> None:
    """Peak of torch's allocations, by its profiler: less than a third of the fp32 logits, which the unfused loss
    holds."""
    tokens, size, vocabulary = 2048, 16, 4096
    hidden = torch.randn(tokens, size, requires_grad=True)
    weight = torch.randn(vocabulary, size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))

    def fused() -> None:
        head_loss(hidden, weight, None, labels, vocabulary, ALONE).backward()

    def plain() -> None:
        F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum").backward()

    logits = tokens * vocabulary * 4
    assert peak_bytes(fused) < logits / 3 < logits < peak_bytes(plain)


def loss_in_blocks(rank: int, world_size: int, dtype: torch.dtype) -> list[Tensor]:
    """The loss and its gradients with respect to hidden states and this rank's part of the weight, in blocks of 3
    rows."""
    axis = Grid.build(1, world_size).tensor
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype) for n in (20, 37))
    labels = torch.randint(0, 37, (20,), generator=generator)
    start, stop = share(37, axis)
    own = [hidden.requires_grad_(), weight[start:stop].clone().requires_grad_()]
    with pytest.MonkeyPatch.context() as patch:
        if world_size > 1:
            patch.setattr("megalite.parallel.loss.block_rows", lambda *sizes: 3)
        loss = head_loss(*own, None, labels, 37, axis)
    loss.backward()
    gradients = [value.grad for value in own if value.grad is not None]
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_chunk_with_an_uneven_vocabulary_are_the_chunk(dtype: torch.dtype) -> None:
    ((loss, of_hidden, of_weight),) = run_ranks(1, loss_in_blocks, dtype)
    first, second = run_ranks(2, loss_in_blocks, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for part in (first, second):
        torch.testing.assert_close(part[0], loss, **close)
    torch.testing.assert_close(first[1] + second[1], of_hidden, **close)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), of_weight, **close)


def test_devices_hold_few_logits_in_fp32() -> None:
    """With Llama 3's vocabulary, whole and divided."""
    for ranks in (1, 8):
        columns = -(-128_256 // ranks)
        rows = block_rows(8192, columns, ranks, "cuda")
        assert 0.9 * AT_A_TIME_ON_DEVICES < rows * columns <= AT_A_TIME_ON_DEVICES
    assert block_rows(8192, 2**27, 1, "cuda") == 1
    assert block_rows(100, 128, 1, "cuda") == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_and_makes_no_copy(dtype: torch.dtype) -> None:
    values = torch.randn(3, 100_001).mul(1e3).to(dtype)
    assert squares(values).item() == pytest.approx(values.double().square().sum().item(), rel=1e-13)
    assert squares(values[:, 1:]).item() == pytest.approx(
        values[:, 1:].double().square().sum().item(), rel=1e-13
    )
    assert peak_bytes(lambda: squares(values)) < 1.1 * 8 * BLOCK
    several = [values[0], values[1:, ::2], values[:, :7].t(), values[2, :0].sum()]
    exact = torch.stack([value.double().square().sum() for value in several])
    for made in (squares_of(several), fused_squares_of(several)):
        torch.testing.assert_close(made, exact, rtol=1e-13, atol=0)
    values[1, 70_000] = torch.nan
    assert squares(values).isnan() and fused_squares_of([values]).isnan().all()
