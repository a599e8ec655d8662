"""A step split by kind of work (megalite/prove/time_split.py)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalite.prove.time_split import split_by_kind


def test_an_operator_belongs_to_the_outermost_kind_that_holds_it() -> None:
    linear, norm = nn.Linear(256, 512), nn.RMSNorm(512)
    head = nn.Parameter(torch.randn(64, 512))
    optimizer = torch.optim.AdamW([*linear.parameters(), *norm.parameters()], fused=True)

    class Loss(torch.autograd.Function):
        """A product inside a loss."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            return (hidden @ head.t()).sum()

        @staticmethod
        def backward(ctx: Any, *slopes: torch.Tensor) -> torch.Tensor:
            return slopes[0].expand(128, 512)

    Loss.__name__ = "_HeadLoss"

    def step(loss: bool) -> None:
        heads = norm(linear(torch.randn(128, 256))).view(1, 128, 4, 128).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        hidden = mixed.transpose(1, 2).reshape(128, 512)
        (Loss.apply(hidden) if loss else hidden.sum()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    step(True)
    found = split_by_kind(lambda: step(True))
    kinds = {"products", "attention", "normalization", "loss", "optimizer"}
    assert kinds <= found.keys() and all(found[kind] > 0 for kind in kinds)
    assert "loss" not in split_by_kind(lambda: step(False))
