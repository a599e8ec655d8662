"""A checkpoint of any layout loads on any other, bit for bit; a resumed run equals one that was not stopped."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint.files import WEIGHT, Checkpoint, checkpoints_of, find_checkpoint
from megalite.checkpoint.save import Saver, failure_line, owned_boxes
from megalite.checkpoint.storage import SaveFailed
from megalite.checkpoint.weights import check_names, load_shards, open_together
from megalite.engine.engine import Engine
from megalite.errors import CheckpointError
from megalite.parallel.layers import Shard
from tests.ranks import run_ranks
from tests.small_models import Layout, Task, build, train_steps

TASK = Task("gpt2", tied=True, batch=8)
# Each loads what the previous two have saved: pipe, tensor, data, every ZeRO stage, both dtypes.
CHAIN = [
    Layout(data=2, stage=0),
    Layout(pipe=2, tensor=2, stage=1),
    Layout(data=2, stage=3),
    Layout(tensor=2, data=2, stage=2, dtype="bf16"),
    Layout(pipe=2, data=2, stage=2),
    Layout(tensor=2, stage=3),
    Layout(pipe=4, stage=1, dtype="bf16"),
    Layout(stage=1),
]
STATE: dict[str, Any] = {
    "step": 2,
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "seed": 1,
    "model": TASK.section,
}


def kinds(shard: Shard) -> dict[str, torch.Tensor]:
    return {WEIGHT: shard.master, **shard.state}


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    """Masters and moments, and the model's weights."""
    held = {
        f"{k}/{s.placement.name}": v.clone() for s in engine.shards() for k, v in kinds(s).items()
    }
    if engine.zero_optimization_stage() < 3:
        held |= {
            f"model/{name}": value.detach().clone()
            for name, value in engine.module.named_parameters()
        }
    return held


def load(engine: Engine, path: Path, step: int) -> None:
    checkpoint = open_together(path)
    check_names(checkpoint, list(engine.global_norm.row))
    engine.make_moments(step)
    load_shards(checkpoint, engine.shards(), moments=True)
    engine.masters_changed()


def assert_equals_file(engine: Engine, path: Path) -> None:
    """Compares every shard with the same range of the whole tensor, which one process reads."""
    checkpoint, seen = Checkpoint.open(path), 0
    for shard in engine.shards():
        for kind, values in kinds(shard).items():
            whole = checkpoint.read(shard.placement.name, kind=kind)
            own = shard.placement.cut(whole).contiguous().view(-1)
            assert torch.equal(values, own[shard.start : shard.start + values.numel()]), (
                kind,
                shard.placement.name,
            )
            seen += 1
    assert seen >= 3


def load_each(rank: int, world_size: int, layout: Layout, checkpoints: list[Path]) -> None:
    engine, *_ = build(layout, TASK)
    for path in checkpoints:
        load(engine, path, 2)
        assert_equals_file(engine, path)


def save_and_resume(
    rank: int, world_size: int, layout: Layout, before: list[Path], run: Path
) -> None:
    engine, pipeline, grid = build(layout, TASK)
    for path in before:
        load(engine, path, 2)
        assert_equals_file(engine, path)
    # Every second layout has no room for a copy.
    saver = Saver(
        run, keep=3, copy_limit_bytes=0 if len(before) == 1 or layout.stage == 2 else None
    )
    train_steps(engine, pipeline, grid, layout, TASK, range(2))
    saver.save(2, owned_boxes(engine.shards(), grid, layout.stage == 0), STATE)
    # While the file is written.
    going_on = train_steps(engine, pipeline, grid, layout, TASK, range(2, 4))
    saver.wait()
    expected = snapshot(engine)
    engine, pipeline, grid = build(layout, TASK)
    load(engine, find_checkpoint(run), 4 if before else 2)
    resumed = train_steps(engine, pipeline, grid, layout, TASK, range(2, 4))
    assert resumed == going_on
    for name, value in snapshot(engine).items():
        assert torch.equal(value, expected[name]), name


def test_every_layout_resumes_bitwise_and_loads_the_two_before(tmp_path: Path) -> None:
    save_in_every_layout(tmp_path)


def save_in_every_layout(folder: Path) -> list[Path]:
    saved: list[Path] = []
    for number, layout in enumerate(CHAIN):
        run = folder / str(number)
        run_ranks(layout.world_size, save_and_resume, layout, saved[-2:], run)
        saved.append(find_checkpoint(run))
        assert (run / "checkpoints" / "latest").read_text().strip() == saved[-1].name
        checkpoint = Checkpoint.open(saved[-1])
        assert len(checkpoint.index.entries) == 3 * len(checkpoint.names)
    return saved


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_layout_loads_every_other(tmp_path: Path) -> None:
    saved = save_in_every_layout(tmp_path)
    for number, layout in enumerate(CHAIN):
        run_ranks(
            layout.world_size,
            load_each,
            layout,
            saved[:number] + saved[number + 1 :],
            timeout_seconds=600,
        )


def fail_on_one_rank(rank: int, world_size: int, run: Path) -> None:
    layout = Layout(data=2, stage=1)
    engine, pipeline, grid = build(layout, TASK)
    saver = Saver(run, keep=1)
    train_steps(engine, pipeline, grid, layout, TASK, range(1))

    def save(step: int) -> None:
        saver.save(step, owned_boxes(engine.shards(), grid, False), STATE)
        saver.wait()

    save(1)
    for where in ("write", "fsync"):
        whole = getattr(os, where)

        def full_disk(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        if rank == 1:
            setattr(os, where, full_disk)
        with pytest.raises(SaveFailed) as raised:
            save(2)
        assert "rank 1: [Errno 28] No space left on device" in failure_line(raised.value)
        setattr(os, where, whole)
        dist.barrier()
        assert [path.name for path in checkpoints_of(run)] == ["step_00000001"]
    if rank == 0:
        assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step_00000001"]
    dist.barrier()
    save(3)
    dist.barrier()
    assert [path.name for path in checkpoints_of(run)] == ["step_00000003"]
    with (run / "checkpoints" / "step_00000003" / "tensors_00001.safetensors").open("r+b") as file:
        file.write(b"?")
    with pytest.raises(CheckpointError, match="tensors_00001.safetensors: damaged"):
        open_together(run / "checkpoints" / "step_00000003")


def test_an_error_on_one_rank_is_every_rank_s_and_loses_nothing(tmp_path: Path) -> None:
    run_ranks(2, fail_on_one_rank, tmp_path)


def load_another_model(rank: int, world_size: int, run: Path) -> None:
    engine, _, _ = build(Layout(stage=1), Task("llama", tied=False))
    checkpoint = open_together(find_checkpoint(run))
    with pytest.raises(CheckpointError, match="the model has no such tensor"):
        check_names(checkpoint, list(engine.global_norm.row))
    with pytest.raises(CheckpointError, match="no such tensor|must be equal"):
        load_shards(checkpoint, engine.shards(), moments=False)


def save_once(rank: int, world_size: int, run: Path) -> None:
    engine, _, grid = build(Layout(stage=1), TASK)
    saver = Saver(run, keep=1)
    saver.save(0, owned_boxes(engine.shards(), grid, False), STATE)
    saver.wait()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_ranks(1, save_once, tmp_path)
    assert not Checkpoint.open(
        find_checkpoint(tmp_path)
    ).has_moments  # there are none before the first step
    run_ranks(1, load_another_model, tmp_path)
