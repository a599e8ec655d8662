"""Cross entropy with the head's product (megalite/parallel/loss.py) on one rank, compared with torch's in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.parallel import loss as over
from megalite.parallel.grid import ALONE
from megalite.parallel.loss import IGNORED, chunk_rows, head_loss, row_length, token_losses

TOKENS, SIZE, VOCABULARY = 37, 16, 53


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, SIZE, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::5] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def reference(values: tuple[Tensor, ...], labels: Tensor, z_loss: float) -> Tensor:
    hidden, weight, bias = values
    logits = F.linear(hidden, weight, bias)
    squares = logits.logsumexp(-1).square()[labels != IGNORED].sum()
    return F.cross_entropy(logits, labels, reduction="sum") + z_loss * squares


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("rows", [5, 256])  # chunks of tokens
@pytest.mark.parametrize("in_cache", [60, 2**18])  # blocks within them
def test_loss_and_gradients_are_torchs(
    z_loss: float, rows: int, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over, "LEAST_ROWS", rows)
    monkeypatch.setattr(over, "IN_CACHE", in_cache)
    *values, labels = drawn()
    hidden, weight, bias = values
    loss = head_loss(hidden, weight, bias, labels, VOCABULARY, ALONE, z_loss)
    found = torch.autograd.grad(3.0 * loss, values)
    wide = tuple(value.detach().double().requires_grad_() for value in values)
    wanted = reference(wide, labels, z_loss)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(3.0 * wanted, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_accurate_as_they_allow(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = drawn(dtype)
    loss = head_loss(hidden, weight, bias, labels, VOCABULARY, ALONE)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    wide = tuple(value.detach().double().requires_grad_() for value in (hidden, weight, bias))
    wanted = reference(wide, labels, 0.0)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=0.02)
    for one, other in zip(found, torch.autograd.grad(wanted, wide), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 0.03 * other.norm()


def test_only_needed_gradients_are_computed_and_ignored_tokens_have_none() -> None:
    hidden, weight, _, labels = drawn()
    head_loss(hidden, weight.detach(), None, labels, VOCABULARY, ALONE).backward()
    assert weight.grad is None and hidden.grad is not None
    assert not hidden.grad[::5].any() and hidden.grad[1].any()
    nothing = torch.full_like(labels, IGNORED)
    loss = head_loss(hidden, weight, None, nothing, VOCABULARY, ALONE)
    loss.backward()
    assert loss.item() == 0.0 and weight.grad is not None and not weight.grad.any()


def test_the_host_may_determine_which_labels_count() -> None:
    hidden, weight, _, labels = drawn()
    counted = (labels != IGNORED).nonzero().squeeze(-1)
    every = head_loss(hidden, weight, None, labels, VOCABULARY, ALONE)
    some = head_loss(hidden, weight, None, labels, VOCABULARY, ALONE, counted=counted)
    assert some.item() == pytest.approx(every.item())


def test_losses_of_tokens() -> None:
    logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    labels = drawn()[3]
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(token_losses(logits.clone(), labels, VOCABULARY, ALONE), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_logits_that_have_gaps_between_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs with an odd vocabulary, whose kernels need rows that start at a multiple of 16 bytes: same loss, same
    gradients."""
    hidden, weight, bias, labels = drawn(dtype)
    monkeypatch.setattr(over, "LEAST_ROWS", 5)
    results, strides = [], set[int]()
    mm = torch.addmm

    def told(*args: Tensor, out: Tensor) -> Tensor:
        strides.add(out.stride(0))
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "addmm", told)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(
            over, "row_length", lambda *sizes, kind=device: row_length(*sizes[:2], kind)
        )
        loss = head_loss(hidden, weight, bias, labels, VOCABULARY, ALONE, 0.01)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight, bias))])
    assert strides == {VOCABULARY, 56}
    for close, apart in zip(*results, strict=True):
        torch.testing.assert_close(apart, close)


def test_rows_of_logits_begin_where_a_gpus_kernels_load_16_bytes() -> None:
    assert row_length(50257, 2, "cuda") == 50264 and row_length(50257, 4, "cuda") == 50260
    for columns in (32_000, 128_256 // 8):
        assert row_length(columns, 2, "cuda") == columns
    assert row_length(50257, 2, "cpu") == 50257  # on a CPU, gaps would slow down elementwise passes
    room = over._Room(8, 53, torch.empty(53, 16, device="meta"), torch.float32, ALONE)
    assert room.product.shape == (8, 53) and room.product.stride() == (56, 1)


def test_a_chunk_takes_no_more_than_the_weights_gradient() -> None:
    for tokens, size, columns, width in ((4096, 1024, 50_000, 2), (100, 64, 32_000, 4)):
        rows = chunk_rows(tokens, size, columns, width, "cpu")
        assert 1 <= rows <= tokens
        assert rows * columns * width <= max(4 * columns * size, 2**8 * columns * width)
    # Four equal chunks, not chunks of 256 and a rest.
    assert chunk_rows(1000, 64, 500, 4, "cpu") == 250
    assert chunk_rows(0, 64, 500, 4, "cpu") == 1
