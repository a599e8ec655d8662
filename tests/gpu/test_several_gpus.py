"""What needs two GPUs or more: NCCL between them. bash tools/test_gpu.sh."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.configs import config, figures, large
from tests.gpu.ranks import on_ranks
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.timeout(1800)
Needs = Callable[[int], None]
STEPS = 3


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1", "zb-v"])
def test_messages_larger_than_nccls_buffers_do_not_hang(
    tmp_path: Path, schedule: str, needs: Needs
) -> None:
    """4 × 4,096 × 4,096 numbers in bf16 are 128 MiB."""
    needs(2)
    document = config(
        tmp_path, 2, parallel={"pipe": 2, "schedule": schedule}, data={"sequence_length": 4096},
        model={"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 1024},
        train_micro_batch_size_per_gpu=4, train_batch_size=32,
    )  # fmt: skip
    everyone = on_ranks(2, "losses", config=document, steps=2)
    assert len(everyone[0]) == 2


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipe": 2}, {}], ids=str
)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_layout_is_the_run_of_one_gpu(
    tmp_path: Path, parallel: dict[str, Any], zero: int, needs: Needs
) -> None:
    needs(2)
    if "pipe" in parallel and zero == 3:
        pytest.skip("ZeRO-3 takes no pipe axis")
    one = on_ranks(1, "losses", config=config(tmp_path, zero=1, precision="fp32"), steps=STEPS)[0]
    document = config(tmp_path, 2, zero=zero, precision="fp32", parallel=parallel)
    for rank in on_ranks(2, "losses", config=document, steps=STEPS):
        for (loss, norm), (one_loss, one_norm) in zip(rank, one, strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-5) and norm == pytest.approx(
                one_norm, rel=1e-4
            )


@pytest.mark.parametrize(
    "ranks, parallel",
    [
        (2, {}), (2, {"context": 2}), (2, {"tensor": 2, "sequence": True}), (4, {"pipe": 2, "tensor": 2}),
        (4, {"tensor": 2, "context": 2, "sequence": True}), (4, {"pipe": 2, "schedule": "zb-v"}),
        (8, {"pipe": 2, "tensor": 2}), (8, {"tensor": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_a_grid_with_overlapped_reductions_is_the_run_of_one_gpu(
    tmp_path: Path, ranks: int, parallel: dict[str, Any], needs: Needs
) -> None:
    needs(ranks)
    keys: dict[str, Any] = {"model": {"num_attention_heads": 8, "num_key_value_heads": 4}}
    alone = config(tmp_path, precision="fp32", **keys)
    one = on_ranks(1, "losses", config=alone, steps=STEPS)[0]
    zero: dict[str, Any] = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 200_000}
    document = config(
        tmp_path, ranks, precision="fp32", parallel=parallel, zero_optimization=zero, **keys
    )
    for rank in on_ranks(ranks, "losses", config=document, steps=STEPS):
        for (loss, norm), (one_loss, one_norm) in zip(rank, one, strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-5) and norm == pytest.approx(
                one_norm, rel=1e-4
            )


@pytest.mark.parametrize(
    "zero, parallel",
    [
        (3, {}), (2, {}), (1, {"pipe": 2}), (2, {"pipe": 2, "schedule": "zb-v"}),
        (1, {"tensor": 2, "sequence": True}), (1, {"context": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_of_several_ranks_waits_for_the_device_at_most_three_times(
    tmp_path: Path, zero: int, parallel: dict[str, Any], needs: Needs
) -> None:
    """And in no forward or backward."""
    needs(2)
    document = config(
        tmp_path, 2, zero=zero, parallel=parallel, data={"reset_attention": True},
        zero_optimization={"stage": zero, "overlap_comm": "pipe" not in parallel},
    )  # fmt: skip
    for counts in on_ranks(2, "waits", config=document, steps=3):
        assert max(counts) <= 3, counts


@pytest.mark.parametrize("overlaps", [False, True], ids=["", "overlapped"])
def test_throughput_of_two(
    tmp_path: Path, overlaps: bool, needs: Needs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures for docs/gpus.md: what `overlap_comm` saves."""
    needs(2)
    zero = {"stage": 1, "overlap_comm": overlaps}
    document = large(tmp_path, "1B", ranks=2, zero_optimization=zero)
    told, _ = on_ranks(2, "throughput", config=document, steps=10)
    with capsys.disabled():
        print(f"\n1B on data 2{', overlap_comm' if overlaps else ''}: {figures(told)}")
    assert 0 < told["mfu"] < 1


def test_layouts_are_verified(tmp_path: Path, needs: Needs) -> None:
    needs(2)
    (tmp_path / "config.json").write_text(json.dumps(config(tmp_path, precision="fp32")))
    layouts = ["tensor=2,zero=1", "pipe=2,zero=2", "data=2,zero=3"]
    command = [
        sys.executable,
        "tools/verify_layouts.py",
        "--deepspeed_config",
        str(tmp_path / "config.json"),
    ]
    done = subprocess.run(
        [*command, "--layouts", *layouts], cwd=REPOSITORY, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
