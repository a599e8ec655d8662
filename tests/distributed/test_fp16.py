"""fp16 with a loss scale: close to fp32 and bf16 on every layout, all ranks agree on an overflow, and a resumed run is
bitwise equal."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.parallel.grid import ALONE
from megalite.parallel.loss import head_loss
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, rows, spoilt, train

LAYOUTS = [
    {"pipe": 2, "zero": 2},
    {"tensor": 2, "zero": 1},
    {"zero": 3},
    {"zero": 2},
    {"pipe": 2, "zero": 1},
]
STEPS = 6
FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}
}


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir)]


def test_losses_keep_near_fp32_on_every_layout(tmp_path: Path) -> None:
    """Closer than bf16, which has 8 times the rounding. The scale grows after steps 3 and 5, where DeepSpeed's own step
    would halve the gradient."""
    one = {"zero": 1}
    precisions: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        "fp16": FP16,
    }
    run_ranks(
        1,
        train,
        [(document(tmp_path, name, one, **keys), nothing) for name, keys in precisions.items()],
    )
    whole = losses(tmp_path / "fp32")
    assert len(whole) == STEPS
    bound = max(np.abs(np.subtract(losses(tmp_path / "bf16"), whole)))
    run_ranks(
        2,
        train,
        [(document(tmp_path, f"two{i}", lay, **FP16), nothing) for i, lay in enumerate(LAYOUTS)],
    )
    for name in ("fp16", *(f"two{i}" for i in range(len(LAYOUTS)))):
        assert max(np.abs(np.subtract(losses(tmp_path / name), whole))) < bound, name
        assert [row["loss_scale"] for row in rows(tmp_path / name)] == [2**10] * 3 + [2**11] * 2 + [
            2**12
        ]


@pytest.mark.parametrize(
    "layout, world",
    [
        pytest.param({"pipe": 2, "tensor": 2, "zero": 2}, 8, marks=pytest.mark.long),
        ({"pipe": 2, "zero": 1}, 4),
        pytest.param({"zero": 3}, 2, marks=pytest.mark.long),
    ],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_a_resumed_run_is_the_same(
    tmp_path: Path, layout: dict[str, int], world: int
) -> None:
    """The overflow is on the last rank at step 3; one run is interrupted after step 4, the other is not."""
    plant = functools.partial(spoilt, on=world - 1, at={3}, factor=1e6, micro_batch=0)
    keys = {
        **FP16,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 3, "total_num_steps": 9},
        },
    }

    def of(run: str, steps: int) -> dict[str, Any]:
        return document(tmp_path, run, layout, train={"steps": steps}, **keys)

    results = run_ranks(
        world, train, [(of("a", 6), plant), (of("b", 4), plant), (of("b", 6), nothing)]
    )
    assert results == [[0, 0, 0]] * world
    whole, broken = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row.get("skipped") for row in whole] == [None, None, "overflow", None, None, None]
    assert [row["skipped_steps"] for row in whole] == [0, 0, 1, 1, 1, 1]
    assert [row["loss_scale"] for row in whole] == [2**10, 2**10, 2**10, 2**9, 2**9, 2**9]
    assert whole[2]["grad_norm"] is None and whole[2]["consumed_samples"] == 24
    assert whole[3]["learning_rate"] > whole[2]["learning_rate"], (
        "the schedule is a function of the step"
    )
    same = (
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "loss_scale",
        "skipped_steps",
        "consumed_samples",
    )
    for a, b in zip(whole, broken, strict=True):
        assert [a[key] for key in same] == [b[key] for key in same]
    a, b = (Checkpoint.open(find_checkpoint(tmp_path / run)) for run in "ab")
    assert a.state == b.state and a.state["loss_scale"]["cur_scale"] == 2**10
    for name in a.names:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert a.read(name, kind=kind).equal(b.read(name, kind=kind)), name


def test_with_offload_an_overflow_leaves_nothing_in_the_gradient_sums(tmp_path: Path) -> None:
    plant = functools.partial(spoilt, on=1, at={3}, factor=1e6)
    runs = []
    for zero in (1, 2, 3):
        for device in ("none", "cpu"):
            keys = document(tmp_path, f"{device}{zero}", {"zero": zero}, **FP16)
            keys["zero_optimization"]["offload_optimizer"] = {"device": device}
            runs.append((keys, plant))
    assert run_ranks(2, train, runs) == [[0] * len(runs)] * 2
    for zero in (1, 2, 3):
        device, host = rows(tmp_path / f"none{zero}"), rows(tmp_path / f"cpu{zero}")
        assert [row.get("skipped") for row in host] == [None, None, "overflow", None, None, None]
        for key in ("loss", "grad_norm", "loss_scale"):
            assert [row[key] for row in host] == [row[key] for row in device], (zero, key)


def test_an_overflow_that_no_loss_scale_cures_stops_the_run(tmp_path: Path) -> None:
    keys = {"fp16": {"enabled": True, "loss_scale": 64.0}}
    plant = functools.partial(spoilt, on=1, at={2}, factor=1e7)
    first, second = run_ranks(2, train, [(document(tmp_path, "a", {}, **keys), plant)])
    assert first == second and first[0].startswith("step 2: gradient norm is ")
    assert "first in backward of micro-batch 1 on rank 1 on " in first[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpus_make_fp32_products_of_fp16_in_tf32(dtype: torch.dtype) -> None:
    """Only the gradients of the head; neither its logits nor any product of an fp32 run."""
    hidden, weight = (torch.randn(n, 16).to(dtype).requires_grad_() for n in (6, 9))
    mm, told = torch.mm, []

    def product(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        told.append((a.dtype, torch.backends.cuda.matmul.allow_tf32))
        return mm(a, b, **options)

    with mock.patch.object(torch, "mm", product):
        head_loss(hidden, weight, None, torch.arange(6), 9, ALONE).backward()
    raised = torch.float32 if dtype == torch.float16 else dtype
    assert told == [(dtype, False), (raised, dtype == torch.float16)]
    assert not torch.backends.cuda.matmul.allow_tf32
