"""Functions with a custom backward, compared with autograd through plain operations in fp64."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megalite.model.norms import rms_norm
from megalite.model.rotary import rotate, spread


def gradients(output: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, slope)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 5, 4, 8)])
def test_the_norm_is_as_accurate_as_the_dtype_allows(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """More accurate than transformers', in forward and backward."""
    torch.manual_seed(0)
    x, slope = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    theirs = LlamaRMSNorm(shape[-1], 1e-5).to(dtype)
    theirs.weight.data.normal_(1.0, 0.3)
    weight = theirs.weight.detach().clone()
    wide = [value.double().requires_grad_() for value in (x, weight)]
    exact = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[1]
    wanted = gradients(exact, wide, slope.double())
    ours = [x.clone().requires_grad_(), weight.requires_grad_()]
    made = gradients(rms_norm(*ours, 1e-5), ours, slope)
    other = x.clone().requires_grad_()
    peers = gradients(theirs(other), [other, theirs.weight], slope)
    for mine, theirs_, value in zip(made, peers, wanted, strict=True):
        assert mine.dtype == dtype
        distance = (mine - value).norm()
        assert distance < 2 * torch.finfo(dtype).eps * value.norm()
        assert distance < 1.5 * (theirs_ - value).norm()


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
