"""Optimizer states in files: the run is bitwise equal to ZeRO-3 in memory; sizes are predicted to the byte; checkpoints
from and to any layout; and what is refused, with the reason, before ranks start."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.files import find_checkpoint
from megalite.checkpoint.save import Saver, owned_boxes
from megalite.checkpoint.weights import load_shards, open_together
from megalite.config import Config
from megalite.engine.build import build_engine, build_pipeline
from megalite.engine.engine import Engine
from megalite.engine.nvme import check_nvme, load_op, remove_swap_folders
from megalite.errors import ConfigError
from megalite.model.families import read_spec
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed
from megalite.plan.states import parameter_sizes, predicted_states
from tests.distributed.test_checkpoints import assert_equals_file
from tests.ranks import run_ranks
from tests.small_models import MODELS

# A rank's half of the embedding is just above 1 MiB, and not a multiple of 1 KiB.
VOCABULARY, LENGTH = (
    2049,
    12,
)
MODEL = {
    **MODELS["llama"], "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 341, "num_hidden_layers": 3,
    "tie_word_embeddings": True,
}  # fmt: skip
OFFLOAD = "zero_optimization.offload_optimizer"

pytestmark = pytest.mark.timeout(1500)  # a first build of the op takes minutes


def build_op(rank: int, world_size: int) -> str:
    try:
        load_op()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for files; skips the test if DeepSpeed's op does not build. It is built once per user."""
    if not os.environ.get("AIO"):
        pytest.skip(
            "AIO=1 bash tools/test.sh builds DeepSpeed's async_io, which takes minutes once, and runs this"
        )
    if reason := run_ranks(1, build_op, timeout_seconds=1200, init=False)[0]:
        pytest.skip(f"DeepSpeed's async_io does not build: {reason}")
    folder = tmp_path_factory.mktemp("disk")
    yield folder
    remove_swap_folders(config_of(str(folder)))
    assert not list(folder.iterdir())


def config_of(folder: str | None, stage: int = 3, bf16: bool = False, **offload: Any) -> Config:
    """Of 2 ranks, resolved. folder None: all in memory."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["sub_group_size"] = (
            270_000  # two sub-groups of matrices in files, and one of the rest in memory
        )
    if folder is not None:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": folder, **offload}
    elif offload:
        zero["offload_optimizer"] = offload
    document = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1}},
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "megalite": {
            "model": MODEL,
            "data": {"sequence_length": LENGTH, "train": ["unused"]},
            "train": {"steps": 10, "run_dir": "unused"},
        },
    }
    if offload.get("pipeline_read"):
        document["aio"] = {
            "block_size": 2**16, "intra_op_parallelism": 2, "single_submit": True, "overlap_events": False,
        }  # fmt: skip
    return Config.from_dict(document).resolve(2)


def build(config: Config) -> tuple[Engine, Any]:
    spec = read_spec(config.model)
    engine = build_engine(config, spec, Grid.build(1, 1))
    return engine, build_pipeline(engine, config, spec)


def train(
    engine: Engine, pipeline: Any, steps: range, refused: int | None = None
) -> list[tuple[float, float]]:
    """(loss of this rank, norm) of each step; the update of step `refused` is skipped."""
    figures = []
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + engine.grid.rank)
        ids = torch.randint(0, VOCABULARY, (2, 2, LENGTH + 1), generator=generator)
        engine.global_norm.judge = lambda loss, norm, step=step: step != refused
        loss = pipeline.train_step(
            [(some[:, :-1].contiguous(), some[:, 1:].contiguous()) for some in ids], 0.01
        )
        figures.append((loss.item(), float(engine.get_global_grad_norm() or 0.0)))
    return figures


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Masters and moments, and the shards from which the model's weights are gathered."""
    held = {
        f"{kind}/{shard.placement.name}": values.detach().clone()
        for shard in engine.shards()
        for kind, values in {"weight": shard.master, **shard.state}.items()
    }
    weights = (
        (place.name, getattr(value, "ds_tensor", value)) for value, place in placed(engine.stage)
    )
    return held | {f"model/{name}": value.detach().clone() for name, value in weights}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and any(name.startswith("exp_avg_sq/") for name in one)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


TWINS = [  # in memory, and in files
    ({}, {}),
    ({"bf16": True}, {"bf16": True, "pipeline_read": True, "pipeline_write": True}),
]


def train_twins(rank: int, world_size: int, disk: Path) -> None:
    deepspeed.init_distributed("gloo")
    for plain, filed in TWINS:
        engine, pipeline = build(config_of(None, **plain))
        figures, expected = train(engine, pipeline, range(3), refused=1), snapshot(engine)
        assert len({norm for _, norm in figures}) > 1 and figures[0][1] > 0.5  # clipped
        config = config_of(str(disk), **filed)
        engine, pipeline = build(config)
        (folder,) = (
            path for path in disk.glob("*/zero_stage_3/optimizer/*") if path.name == f"rank{rank}"
        )
        with engine.weighed() as held:
            first = train(engine, pipeline, range(1))
        assert first + train(engine, pipeline, range(1, 3), refused=1) == figures
        assert_same(snapshot(engine), expected)
        place = Grid.at(rank, 1, 2, 1)
        told = predicted_states(
            config, parameter_sizes(config, read_spec(config.model), place), place
        )
        names = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
        assert [held[name] for name in names] == [told.weights, told.gradients, told.optimizer]
        assert sum(file.stat().st_size for file in folder.iterdir()) == told.files > 0
        assert len(list(folder.iterdir())) == 3 * 3  # sub-groups in files
        dist.barrier()
        if rank == 0:
            remove_swap_folders(config)
        dist.barrier()


def test_a_run_with_files_is_the_run_in_memory_and_is_told_to_the_byte(disk: Path) -> None:
    run_ranks(2, train_twins, disk, timeout_seconds=240)


def load(engine: Engine, run: Path, updates: int) -> None:
    engine.make_moments(updates)
    load_shards(open_together(find_checkpoint(run)), engine.shards(), moments=True)
    engine.masters_changed()


def save_and_load(rank: int, world_size: int, disk: Path, folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    files, memory = config_of(str(disk), pipeline_read=True), config_of(None, stage=1)

    def save(engine: Engine, run: Path, copy_limit_bytes: int | None) -> None:
        saver = Saver(run, keep=1, copy_limit_bytes=copy_limit_bytes)
        state = {"step": 2, "consumed_samples": 0, "consumed_tokens": 0, "seed": 1, "model": MODEL}
        saver.save(2, owned_boxes(engine.shards(), engine.grid, False), state)
        saver.wait()

    engine, pipeline = build(files)
    train(engine, pipeline, range(2))
    save(engine, folder / "copied", None)
    save(engine, folder / "mapped", 0)  # no room for a copy
    going_on = train(engine, pipeline, range(2, 3))
    expected = snapshot(engine)
    load(engine, folder / "copied", 2)  # rewinding, in an engine that has stepped
    assert train(engine, pipeline, range(2, 3)) == going_on
    assert_same(snapshot(engine), expected)

    other, pipeline = build(memory)
    load(other, folder / "mapped", 2)
    assert_equals_file(other, find_checkpoint(folder / "copied"))
    ours = train(other, pipeline, range(2, 3))
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in going_on], rel=1e-5)
    save(other, folder / "back", None)

    engine, pipeline = build(files)
    load(engine, folder / "back", 3)
    assert_equals_file(engine, find_checkpoint(folder / "back"))
    assert all(norm > 0 for _, norm in train(engine, pipeline, range(3, 4)))


def test_checkpoints_go_from_files_to_memory_and_back(disk: Path, tmp_path: Path) -> None:
    run_ranks(2, save_and_load, disk, tmp_path, timeout_seconds=240)


def look_for_what_is_missing(rank: int, world_size: int, disk: Path) -> list[str]:
    """Without a compiler, without libaio, and the line of a start."""
    found = [""]
    os.environ["CXX"] = "no-compiler"
    try:
        check_nvme(config_of(str(disk)), read_spec(MODEL), 2)
    except ConfigError as error:
        found[0] = str(error)
    del os.environ["CXX"]
    os.environ["CC"] = "false"  # DeepSpeed uses it to look for libaio
    return [*found, build_op(rank, world_size)]


def test_what_is_missing_is_named_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nvme_path: .*must be a folder that can be written"):
        check_nvme(config_of(str(tmp_path / "absent")), read_spec(MODEL), 2)
    with pytest.raises(
        ConfigError, match=r"nvme_path: .*must have [0-9,]+ bytes free for .* of 10000000 ranks"
    ):
        check_nvme(config_of(str(tmp_path)), read_spec(MODEL), 10_000_000)
    compiler, libaio = run_ranks(1, look_for_what_is_missing, tmp_path, init=False)[0]
    rule = f'{OFFLOAD}.device: "nvme": needs DeepSpeed\'s async_io op, which does not build here: '
    assert compiler == f"{rule}no C++ compiler (no-compiler)"
    assert libaio == "error: no libaio with its headers (Debian: libaio-dev)"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"stage": 1}, f'{OFFLOAD}.device: "nvme": needs zero_optimization.stage 3 or more'),
        ({"nvme_path": None}, f"{OFFLOAD}.nvme_path: missing: device nvme needs a folder"),
        (
            {"ratio": 0.5},
            f"{OFFLOAD}.ratio: must be 1 or left out: DeepSpeed updates the part that is not",
        ),
        ({"device": "cpu"}, f'{OFFLOAD}.nvme_path: "x": needs {OFFLOAD}.device "nvme"'),
        (
            {"buffer_count": 5, "pipeline_read": True},
            f"{OFFLOAD}.buffer_count: 5: must be at least 6: 3 tensors of a sub-group, and as many for pipeline_read",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of("x", **keys)
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_a_resolved_config_has_the_buffers_that_a_step_needs() -> None:
    for keys, count in (
        ({}, 3),
        ({"pipeline_write": True}, 6),
        ({"pipeline_read": True, "pipeline_write": True}, 9),
    ):
        offload = config_of("x", **keys).to_json()["zero_optimization"]["offload_optimizer"]
        assert offload["buffer_count"] == count
    with pytest.raises(ConfigError, match=r'aio: \{"block_size": 65536\}: needs .*device "nvme"'):
        document = config_of(None).to_json()
        Config.from_dict(document | {"aio": {"block_size": 65536}}).resolve(2)
