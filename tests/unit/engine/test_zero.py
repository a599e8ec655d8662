"""ZeRO-1's fp32 sum of 16-bit gradients, and what clipping touches (megalite/engine/zero.py)."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import megalite.engine.engine as engines
from megalite.engine.engine import Engine
from megalite.engine.zero import ShardedOptimizer
from megalite.engine.zero3 import FullyShardedOptimizer


class Kernels(TorchDispatchMode):
    """Records the operations that read or write numbers, with the dtypes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            dtypes = [value.dtype for value in args if isinstance(value, torch.Tensor)]
            self.found.append((str(func.overloadpacket), dtypes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_is_added_by_one_kernel_without_an_fp32_copy(dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 5, 3).to(dtype)
    optimizer: Any = SimpleNamespace(gradient_accumulation_dtype=torch.float32)
    value: Any = SimpleNamespace(grad=first, grad_accum=None)
    ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)
    value.grad = second
    with Kernels() as kernels:
        ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)
    assert kernels.found == [("aten.add_", [torch.float32, dtype])]
    assert value.grad is None and torch.equal(value.grad_accum, first.float() + second.float())
    ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)  # without a gradient
    assert torch.equal(value.grad_accum, first.float() + second.float())


@pytest.mark.parametrize(
    ("norm", "scale", "limit", "touched"),
    [(0.9, 1.0, 1.0, 0), (5.0, 1.0, 0.0, 0), (1.3, 1.0, 1.0, 2), (0.3, 4.0, 1.0, 2)],
)
def test_gradients_are_touched_only_if_they_change(
    norm: float, scale: float, limit: float, touched: int
) -> None:
    """And then they are bitwise what DeepSpeed's product with a tensor makes of them."""
    gradients, total = [torch.randn(7), torch.randn(3)], torch.tensor(norm)
    divisor = torch.tensor(scale)
    if limit:
        divisor = ((total / scale + 1e-6) / limit).clamp(min=1.0) * scale
    wanted = [gradient * (1.0 / divisor) for gradient in gradients]
    flat, fully = (kind.__new__(kind) for kind in (ShardedOptimizer, FullyShardedOptimizer))
    for optimizer in (flat, fully):
        own: Any = optimizer
        own.loss_scaler, own.clip_grad = SimpleNamespace(cur_scale=scale), limit
        own.custom_loss_scaler, own.torch_autocast_gradscaler = False, None
        own.fp32_partitioned_groups_flat = [SimpleNamespace(grad=g.clone()) for g in gradients]
        held = [value.grad for value in own.fp32_partitioned_groups_flat]
        with Kernels() as kernels:
            if own is flat:
                own.unscale_and_clip_grads(held, total)
            else:
                for number in range(len(held)):
                    own.unscale_and_clip_grads(number, total)
        large = [name for name, dtypes in kernels.found if name == "aten.mul_"]
        assert len(large) == touched
        assert all(a.equal(b) for a, b in zip(held, wanted, strict=True))


@pytest.mark.parametrize(("norm", "calls"), [(0.9, 0), (1.3, 1)])
def test_zero_0_clips_all_gradients_in_one_kernel_and_only_if_they_change(
    norm: float, calls: int
) -> None:
    values: Any = [torch.ones(7), torch.ones(2, 3)]
    for value in values:
        value.grad = torch.randn(value.shape)
    factor = (1.0 / (torch.tensor(norm, dtype=torch.float64) + 1e-6)).clamp(max=1.0)
    wanted = [value.grad * factor.float() for value in values]
    engine: Any = Engine.__new__(Engine)
    nn.Module.__init__(engine)
    engine.module, engine.device = SimpleNamespace(ties=[]), torch.device("cpu")
    engine._config = SimpleNamespace(gradient_clipping=1.0)
    engine.global_norm = lambda *args, **keys: torch.tensor(norm).double()
    placed = [(value, None) for value in values]
    with mock.patch.object(engines, "placed", lambda stage: placed), Kernels() as kernels:
        engine.clip_fp32_gradients()
    names = [name for name, _ in kernels.found if "mul_" in name]
    assert names == ["aten._foreach_mul_"] * calls
    assert all(value.grad.equal(right) for value, right in zip(values, wanted, strict=True))
