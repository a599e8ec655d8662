"""What one GPU can show: bash tools/test_gpu.sh."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.configs import MODELS, config, figures, large, llama_7b_of_64
from tests.gpu.ranks import on_ranks
from tests.launch.starts import Start, rows

pytestmark = pytest.mark.timeout(1800)
Needs = Callable[[int], None]
STEPS = 5


def start(folder: Path, document: dict[str, Any], **train: Any) -> list[dict[str, Any]]:
    """A run by the real `deepspeed` on one GPU, without nvcc: its rows of metrics."""
    document["megalite"]["train"] |= train
    (folder / "config.json").write_text(json.dumps(document))
    path = ":".join(
        part for part in os.environ["PATH"].split(":") if not (Path(part) / "nvcc").exists()
    )
    variables = {"PATH": path, "CUDA_HOME": "", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    begun = Start(
        folder, f"--deepspeed_config={folder / 'config.json'}", ranks=1, variables=variables
    )
    assert begun.wait(300) == 0, begun.text
    assert not (folder / "compiled").exists() or not any((folder / "compiled").rglob("*.so")), (
        "something was compiled"
    )
    return rows(Path(document["megalite"]["train"]["run_dir"]))


def test_a_run_starts_without_a_compiler_and_tells_its_mfu(tmp_path: Path, needs: Needs) -> None:
    needs(1)
    made = start(tmp_path, config(tmp_path), steps=3)
    assert [row["step"] for row in made] == [1, 2, 3]
    assert all(0 < row["mfu"] < 1 for row in made)


def test_a_rank_is_on_its_gpu_with_what_torch_was_told(needs: Needs) -> None:
    needs(1)
    (told,) = on_ranks(1, "device")
    assert (
        told["ordinal"] == 0
        and told["expandable_segments"]
        and told["backend"] == "cpu:gloo,cuda:nccl"
    )
    assert told["flight"], "torch's flight recorder gave nothing: see guard/flight.py, own_flight"


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_step_waits_for_the_device_at_most_three_times(
    tmp_path: Path, zero: int, overlaps: bool, needs: Needs
) -> None:
    """And in no forward or backward: there set_sync_debug_mode is "error". ZeRO-3 needs two ranks for that: on one,
    DeepSpeed makes the host wait at each fetch of a weight."""
    needs(1)
    if overlaps and zero == 0:
        pytest.skip("ZeRO-0 reduces at the end of a step")
    document = config(
        tmp_path, precision="bf16" if zero else "fp32", data={"reset_attention": True},
        zero_optimization={"stage": zero, "overlap_comm": overlaps},
    )  # fmt: skip
    (counts,) = on_ranks(1, "waits", config=document, steps=3)
    assert max(counts) <= 3, counts


def test_attention_is_flash_attention(needs: Needs) -> None:
    needs(1)
    (names,) = on_ranks(1, "kernels")
    assert len(names) == 6
    for case, found in names.items():
        assert any("flash" in name for name in found), (case, found)
        # The one with a mask.
        assert not any("fmha" in name and "cutlass" in name for name in found), (
            case,
            found,
        )


def test_windows_and_documents_are_those_of_the_cpu(needs: Needs) -> None:
    needs(1)
    (found,) = on_ranks(1, "attention_differences")
    assert max(found.values()) < 0.03, found  # bf16 has 8 bits


@pytest.mark.parametrize(
    "zero, precision", [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_states_are_as_predicted(tmp_path: Path, zero: int, precision: str, needs: Needs) -> None:
    needs(1)
    ((told, held),) = on_ranks(1, "states", config=config(tmp_path, zero=zero, precision=precision))
    assert told == held


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_losses_are_those_of_the_cpu(tmp_path: Path, zero: int, needs: Needs) -> None:
    needs(1)
    document = config(tmp_path, zero=zero, precision="fp32")
    runs = [
        on_ranks(1, "losses", accelerator=name, config=document, steps=STEPS)[0]
        for name in ("cpu", None)
    ]
    for (cpu_loss, cpu_norm), (loss, norm) in zip(*runs, strict=True):
        assert loss == pytest.approx(cpu_loss, rel=1e-5) and norm == pytest.approx(
            cpu_norm, rel=1e-4
        )


@pytest.mark.parametrize("zero, precision", [(1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")])
@pytest.mark.parametrize("pinned", [False, True])
def test_losses_with_offload_are_those_without(
    tmp_path: Path, zero: int, precision: str, pinned: bool, needs: Needs
) -> None:
    needs(1)
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": pinned}}
    if zero == 3:
        offload["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    sections = [{"stage": zero}, {"stage": zero, **offload}]
    runs = [
        on_ranks(1, "losses", steps=STEPS, config=config(
            tmp_path, precision=precision, zero_optimization=section))[0]
        for section in sections
    ]  # fmt: skip
    for (loss, norm), (own_loss, own_norm) in zip(*runs, strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-5)
        assert own_norm == pytest.approx(norm, rel=1e-4)


def test_bf16_differs_from_the_cpus_as_bf16_does_from_fp32(tmp_path: Path, needs: Needs) -> None:
    needs(1)

    def of(precision: str, name: str | None) -> list[float]:
        made = on_ranks(
            1, "losses", accelerator=name, config=config(tmp_path, precision=precision), steps=STEPS
        )
        return [loss for loss, _ in made[0]]

    exact, cpu, gpu = of("fp32", "cpu"), of("bf16", "cpu"), of("bf16", None)
    spread = max(abs(a - b) for a, b in zip(exact, cpu, strict=True))
    assert max(abs(a - b) for a, b in zip(exact, gpu, strict=True)) <= 4 * spread


@pytest.mark.parametrize("zero", [1, 3])
def test_a_deterministic_run_resumes_to_the_bit(tmp_path: Path, zero: int, needs: Needs) -> None:
    needs(1)
    document, last = config(tmp_path, zero=zero), 2 * STEPS
    whole = start(
        tmp_path, document, deterministic=True, steps=last, run_dir=str(tmp_path / "whole")
    )
    for steps in (STEPS, last):
        resumed = start(
            tmp_path, document, deterministic=True, steps=steps, run_dir=str(tmp_path / "resumed")
        )
    figures = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in made] for made in (whole, resumed)
    ]
    assert figures[0] == figures[1]


def test_a_checkpoints_copies_are_behind_the_update_and_before_the_next(
    tmp_path: Path, needs: Needs
) -> None:
    """A run that saves after every step is the run that never does, and resumes from each of its checkpoints to it."""
    needs(1)
    document = config(tmp_path, model={"hidden_size": 1024, "intermediate_size": 4096})
    keys = {"deterministic": True, "steps": STEPS, "keep_checkpoints": 0}
    made = [
        start(
            tmp_path, document, run_dir=str(tmp_path / name), checkpoint_interval=interval, **keys
        )
        for name, interval in (("once", 0), ("always", 1))
    ]
    for step in range(1, STEPS):
        run_dir, name = tmp_path / f"from_{step}", f"step_{step:08d}"
        (run_dir / "checkpoints").mkdir(parents=True)
        (tmp_path / "always/checkpoints" / name).rename(run_dir / "checkpoints" / name)
        made.append(start(tmp_path, document, run_dir=str(run_dir), checkpoint_interval=0, **keys))
    figures = [{row["step"]: (row["loss"], row["grad_norm"]) for row in rows} for rows in made]
    assert figures[1] == figures[0]
    for step, resumed in enumerate(figures[2:], start=1):
        assert len(resumed) == STEPS - step and resumed.items() <= figures[0].items()


@pytest.mark.parametrize("rank", [0, 21, 63])
def test_a_rank_of_64_holds_what_was_predicted(
    tmp_path: Path, rank: int, needs: Needs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped 7B at its true size, alone on one GPU, over groups that go nowhere."""
    needs(1)
    config(tmp_path)  # writes the corpus
    ((told, held, peak),) = on_ranks(1, "true_size", config=llama_7b_of_64(tmp_path), rank=rank)
    with capsys.disabled():
        print(f"\nllama_7b_3d, rank {rank} of 64: peak {peak / 2**30:.2f} GiB")
    assert told == held


@pytest.mark.parametrize("compiles", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_throughput(
    tmp_path: Path, name: str, compiles: bool, needs: Needs, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures for docs/gpus.md; 32,768 tokens a step in sequences of 4,096."""
    needs(1)
    if compiles and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++: not found")
    document = large(tmp_path, name, train={"compile": compiles})
    (told,) = on_ranks(1, "throughput", config=document, steps=10)
    with capsys.disabled():
        print(f"\n{name}{', compiled' if compiles else ''}: {figures(told)}")
    assert 0.2 < told["mfu"] < 1
