"""What the benchmarks tell: a step split by kind of work, and what each further micro-batch, layer and rank costs."""

import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalite.errors import ConfigError
from megalite.prove.split import split_by_kind
from megalite.races import growth


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


def test_growth_tells_what_each_further_one_costs(capsys: pytest.CaptureFixture[str]) -> None:
    def measured(config: Any, world_size: int, steps: int) -> list[dict[str, Any]]:
        ms = 5 + 2 * config.accumulation_steps + 3 * config.model["num_hidden_layers"]
        return [{"processor_seconds": [1e-3 * ms] * steps}] * world_size

    with mock.patch.object(growth, "measured", measured):
        assert growth.main(["micro-batches", "layers", "ranks"]) == 0
    out = capsys.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if re.match(r"\| \d", line)]
    further = [row[2].strip(" |") for row in rows]
    assert [float(value) for value in further[1:6]] == pytest.approx([2] * 5)
    assert [float(value) for value in further[7:11]] == pytest.approx([3] * 4)
    assert [float(value) for value in further[12:]] == pytest.approx([0] * 3, abs=1e-9)


def test_growth_of_something_else_is_one_line() -> None:
    with pytest.raises(ConfigError, match="WHAT: tokens: must be one of micro-batches, layers"):
        growth.main(["tokens"])
