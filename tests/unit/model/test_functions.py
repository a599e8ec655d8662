"""Functions with a custom backward, compared with autograd through plain operations in fp64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import megalite.model.attention as attention
from megalite.model import varlen
from megalite.model.context import Context
from megalite.model.norms import rms_norm, torchs_rms_norm
from megalite.model.rotary import rotate, spread


def gradients(output: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, slope)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 5, 4, 8)])
@pytest.mark.parametrize("norm", [rms_norm, torchs_rms_norm])
def test_the_norm_is_as_accurate_as_the_dtype_allows(
    dtype: torch.dtype, shape: tuple[int, ...], norm: Callable[[Tensor, Tensor, float], Tensor]
) -> None:
    """More accurate than transformers', in forward and backward; so is torch's, which GPUs run."""
    torch.manual_seed(0)
    x, slope = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    theirs = LlamaRMSNorm(shape[-1], 1e-5).to(dtype)
    theirs.weight.data.normal_(1.0, 0.3)
    weight = theirs.weight.detach().clone()
    wide = [value.double().requires_grad_() for value in (x, weight)]
    exact = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[1]
    wanted = gradients(exact, wide, slope.double())
    ours = [x.clone().requires_grad_(), weight.requires_grad_()]
    made = gradients(norm(*ours, 1e-5), ours, slope)
    other = x.clone().requires_grad_()
    peers = gradients(theirs(other), [other, theirs.weight], slope)
    for mine, theirs_, value in zip(made, peers, wanted, strict=True):
        assert mine.dtype == dtype
        distance = (mine - value).norm()
        assert distance < 2 * torch.finfo(dtype).eps * value.norm()
        assert distance < 1.5 * (theirs_ - value).norm()


def test_a_device_other_than_a_cpu_has_torchs_norm() -> None:
    x, weight = torch.empty(4, 8, device="meta", requires_grad=True), torch.ones(8, device="meta")
    made = rms_norm(x, weight, 1e-5)
    assert made.shape == x.shape and "_RmsNorm" not in type(made.grad_fn).__name__


def test_the_norm_computes_only_the_gradient_that_is_needed() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad is not None
    rms_norm(x.detach(), weight.requires_grad_(), 1e-5).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [8, 4])
def test_rotation_turns_pairs_and_its_gradient_turns_them_back(
    interleaved: bool, size: int
) -> None:
    torch.manual_seed(0)
    # [B, N, S, H] as [B, S, N, H]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    angles = torch.rand(1, 1, 3, size // 2, dtype=torch.float64)
    turned = rotate(x, spread(angles.cos(), interleaved), angles.sin(), interleaved)
    assert turned.transpose(1, 2).is_contiguous()
    pairs = (
        x[..., :size]
        .unflatten(-1, (-1, 2) if interleaved else (2, -1))
        .movedim(-1 if interleaved else -2, 0)
    )
    complex_pairs = torch.complex(pairs[0], pairs[1]) * torch.polar(torch.ones_like(angles), angles)
    parts = torch.stack(
        [complex_pairs.real, complex_pairs.imag], dim=-1 if interleaved else -2
    ).flatten(-2)
    expected = torch.cat([parts, x[..., size:]], dim=-1)
    torch.testing.assert_close(turned, expected)
    slope = torch.randn_like(expected)
    for ours, theirs in zip(
        gradients(turned, [x], slope), gradients(expected, [x], slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("batches", "queries", "keys"), [(2, 5, 7), (1, 1, 9), (2, 6, 6), (0, 4, 4)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_grouped_heads_by_a_kernel_for_equal_ones(
    batches: int, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs with a mask, in fp32, and on older ones. batches: of the mask; 0: none."""
    torch.manual_seed(0)
    shapes = (2, 6, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    values = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    context = Context()
    if batches:
        context.visible = torch.rand(batches, 1, queries, keys) < 0.6
        context.visible[..., 0] = True
    slope, whole = torch.randn_like(values[0]), F.scaled_dot_product_attention
    asked: list[bool] = []

    def kernel(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> Tensor:
        asked.append(enable_gqa)
        return whole(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    results = []
    for taken in (True, False):
        monkeypatch.setattr(attention, "takes_groups", lambda *args, taken=taken: taken)
        mixed = attention.attend(*values, context, None, causal, None, 0.0)
        results.append(gradients(mixed, values, slope))
    assert asked == [True, False]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("dtype", "new", "masked", "taken"),
    [
        (torch.bfloat16, True, False, True), (torch.bfloat16, True, True, False),
        (torch.float16, False, False, False), (torch.float32, True, False, False),
    ],
)  # fmt: skip
def test_grouped_heads_are_flash_attentions(
    dtype: torch.dtype, new: bool, masked: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "new_enough", lambda device: new)
    query = SimpleNamespace(device=torch.device("cuda"), itemsize=dtype.itemsize)
    visible = torch.ones(1) if masked else None
    assert varlen.takes_groups(query, visible) == taken  # type: ignore[arg-type]
