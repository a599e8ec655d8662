"""GPUs and the start of a rank (megalite/ranks), on a machine without GPUs: ordinals, too few GPUs, settings of torch
and NCCL, file descriptors and timeouts."""

import contextlib
import functools
import os
import resource
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

import megalite.ranks.devices as devices
import megalite.ranks.launch as launch
from megalite.config import load_config
from megalite.config.limits import Limits
from megalite.errors import ConfigError
from megalite.parallel.clock import Clock
from megalite.ranks.devices import GPUNames, library_settings, own_gpu
from megalite.ranks.rank_info import RankInfo
from megalite.training.screen import Screen
from tests.ranks import REPOSITORY, RankFailure, run_ranks
from tests.training_runs import document, nothing, rows, train


def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one() -> None:
    assert [own_gpu(rank, 8, 8) for rank in range(8)] == list(range(8))
    assert [own_gpu(rank, 2, 8) for rank in range(2)] == [0, 1]
    assert {own_gpu(rank, 8, 1) for rank in range(8)} == {0}  # Slurm's --gpus-per-task=1
    with pytest.raises(
        ConfigError, match="ranks on a node: 8: must be at most the 4 GPUs that torch sees there"
    ):
        own_gpu(0, 8, 4)


def report_all(names: list[str]) -> None:
    """The ranks of a node, which see one GPU each, report these names; then the first one checks."""
    store = HashStore()
    reports = [
        threading.Thread(target=GPUNames(store, "node").report, args=(name, len(names)))
        for name in names
    ]
    GPUNames(store, "another node").report(names[0], 1)
    for thread in reports:
        thread.start()
    GPUNames(store, "node").check(len(names))


def test_one_visible_gpu_is_each_ranks_own_or_a_mistake() -> None:
    report_all(["a", "b", "c"])
    with pytest.raises(
        ConfigError, match="ranks on a node: 3: must be at most the 1 GPU that torch sees there"
    ):
        report_all(["a", "b", "a"])


def start_with_one_gpu(rank: int, world_size: int) -> None:
    """Starts a rank that sees one GPU, the same as its neighbour."""
    with (
        patch.object(launch, "visible_gpus", lambda: 1),
        patch.object(launch, "gpu_name", lambda ordinal: "GPU-0"),
    ):
        launch.start_ranks(lambda thorough: pytest.fail("prepared"))


def test_too_few_gpus_are_one_line_before_ranks_start() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, start_with_one_gpu, init=False)
    text = str(failure.value)
    assert "died with exit code 2" in text
    assert text.count("ranks on a node: 2: must be at most the 1 GPU that torch sees there") == 1, (
        text
    )


@contextlib.contextmanager
def driver_without_gpus(accelerator: str | None) -> Iterator[None]:
    """A machine with the driver's files, of whose GPUs torch sees none."""
    exists = Path.exists
    os.environ.pop("DS_ACCELERATOR")
    if accelerator is not None:
        os.environ["DS_ACCELERATOR"] = accelerator
    with patch.object(Path, "exists", lambda path: "/dev/nvidia" in str(path) or exists(path)):
        yield


def start_with_hidden_gpus(
    rank: int, world_size: int, accelerator: str | None, visible: str | None
) -> list[Any]:
    lines: list[str] = []
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def print_line(error: Exception) -> None:
        lines.append(str(error))
        print(error, file=sys.stderr)

    with driver_without_gpus(accelerator), patch.object(launch, "print_line", print_line):
        before = launch.machine_has_gpu()
        launch.start_ranks(lambda thorough: None)
        clock = Clock()
        clock.on = True
        with clock.computing():
            pass
        return [before, launch.machine_has_gpu(), clock.take() >= 0, *lines]


def test_hidden_gpus_are_no_gpus() -> None:
    """The clock of a rank then cannot use events."""
    assert run_ranks(1, start_with_hidden_gpus, None, "", init=False) == [[True, False, True]]


@pytest.mark.parametrize("visible", [None, "7"])
def test_a_gpu_that_torch_does_not_see_is_a_line(visible: str | None) -> None:
    """torch is a build for CPUs, its driver does not fit, or no GPU has the chosen number."""
    ((*_, line),) = run_ranks(1, start_with_hidden_gpus, None, visible, init=False)
    assert line.endswith(
        f"the machine seems to have a GPU, but torch {torch.__version__} can use none: training on the CPU "
        "(DS_ACCELERATOR=cpu hides this line)"
    )


def test_gpus_that_cuda_cannot_use_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's tools still count them, for example if the driver is too old for this torch."""
    monkeypatch.setattr(devices, "machine_has_gpu", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.visible_gpus() == 0
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert devices.visible_gpus() == 8


@pytest.mark.parametrize("name", devices.VISIBLE_GPUS)
def test_a_user_may_hide_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "machine_has_gpu", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for variable in devices.VISIBLE_GPUS:
        monkeypatch.delenv(variable, raising=False)
    assert devices.unused_gpu_line() is not None
    monkeypatch.setenv(name, "-1")
    assert devices.unused_gpu_line() is None


def test_one_rank_of_a_node_shows_what_torch_finds_wrong_with_its_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for local_rank, shown in ((0, 1), (1, 0)):
        with warnings.catch_warnings(record=True) as found:
            launch._quieten(
                RankInfo(rank=4 + local_rank, world_size=8, local_rank=local_rank, local_size=4)
            )
            warnings.warn_explicit("CUDA: no", UserWarning, "a.py", 1, module="torch.cuda")
            warnings.warn_explicit("else", UserWarning, "a.py", 1, module="torch.nn")
        assert len(found) == shown


def start_on(rank: int, world_size: int, gpus: list[int]) -> None:
    """Starts a rank that is alone on its node, with this number of GPUs."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ["DS_ACCELERATOR"] = "cuda" if gpus[rank] else "cpu"
    with (
        patch.object(launch, "visible_gpus", lambda: gpus[rank]),
        patch.object(socket, "gethostname", lambda: f"node-{rank}"),
    ):
        launch.start_ranks(lambda thorough: None)


@pytest.mark.parametrize("gpus", [[1, 0, 1], [0, 1, 1]])
def test_nodes_without_gpus_among_others_are_one_line(gpus: list[int]) -> None:
    """Under NCCL the ranks with GPUs would wait for the others."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(3, start_on, gpus, init=False)
    text, line = str(failure.value), "ranks compute on the CPU there, and on GPUs on other nodes"
    assert "died with exit code 2" in text and text.count(line) == 1, text
    assert f"node-{gpus.index(0)}: {line}" in text


def threads(rank: int, world_size: int, bound: bool) -> int:
    """Threads of a rank on a node of 24 cores; bound: whether its launcher gives each rank its own cores."""
    del os.environ["OMP_NUM_THREADS"]
    cores = range(12 * rank, 12 * rank + 12) if bound else range(24)
    with patch.object(os, "sched_getaffinity", lambda process: {*cores}):
        launch.start_ranks(lambda thorough: None)
    return torch.get_num_threads()


@pytest.mark.parametrize("bound", [True, False])
def test_a_rank_uses_its_share_of_the_cores(bound: bool) -> None:
    assert run_ranks(2, threads, bound, init=False) == [12, 12]


def test_hidden_gpus_that_are_asked_for_are_a_mistake() -> None:
    with pytest.raises(
        RankFailure, match="ranks on a node: 1: must be at most the 0 GPUs"
    ) as failure:
        run_ranks(1, start_with_hidden_gpus, "cuda", None, init=False)
    assert "died with exit code 2" in str(failure.value)


def gpus_taken(rank: int, world_size: int, visible: int) -> list[int]:
    """The GPUs that a rank started by Open MPI makes current: at its start, then in DeepSpeed's engine; and the GPU of
    that engine."""
    import deepspeed.runtime.engine as of_deepspeed

    taken: list[int] = []

    def device_name(ordinal: Any = None) -> str:
        return "cuda" if ordinal is None else f"cuda:{ordinal}"

    gpu = SimpleNamespace(
        device_name=device_name, set_device=taken.append, communication_backend_name=lambda: "gloo"
    )
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(rank)
    with (
        patch.object(launch, "visible_gpus", lambda: visible),
        patch.object(launch, "gpu_name", lambda ordinal: f"GPU-{rank}"),
        patch("megalite.ranks.accelerator.use_accelerator", lambda: gpu),
        patch("deepspeed.init_distributed", lambda verbose: None),
    ):
        launch.start_ranks(lambda thorough: None)
    engine: Any = SimpleNamespace()
    with (
        patch.object(of_deepspeed, "get_accelerator", lambda: gpu),
        patch.object(of_deepspeed, "dist", dist),
    ):
        of_deepspeed.DeepSpeedEngine._configure_with_arguments(engine, None, None)
        of_deepspeed.DeepSpeedEngine._set_distributed_vars(engine, None)
    return [*taken, torch.device(engine.device).index]


@pytest.mark.parametrize(("visible", "wanted"), [(1, [0, 0]), (2, [0, 1]), (8, [0, 1])])
def test_deepspeed_also_uses_a_ranks_own_gpu(visible: int, wanted: list[int]) -> None:
    """DeepSpeed uses LOCAL_RANK, with Slurm's --gpus-per-task=1 the ordinal of a GPU that the rank does not see."""
    for own, taken in zip(wanted, run_ranks(2, gpus_taken, visible, init=False), strict=True):
        assert taken == [own] * 3


def test_libraries_get_settings_that_the_user_has_not_set() -> None:
    alone = library_settings({}, on_gpu=True, interface="lo")
    assert alone["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "NCCL_SOCKET_IFNAME" not in alone and "TORCHDYNAMO_DISABLE" not in alone
    assert alone["TORCH_NCCL_HIGH_PRIORITY"] == "1"
    several = library_settings({}, on_gpu=True, interface="eth1")
    assert (several["GLOO_SOCKET_IFNAME"], several["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")
    users = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "PYTORCH_CUDA_ALLOC_CONF": "x",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_NCCL_HIGH_PRIORITY": "0",
    }
    left = library_settings(users, on_gpu=True, interface="eth0")
    assert set(left) == {"TORCH_GLOO_LAZY_INIT", "TORCH_FR_BUFFER_SIZE"}
    assert set(library_settings({}, on_gpu=False, interface=None)) == {
        "TORCH_GLOO_LAZY_INIT",
        "TORCHDYNAMO_DISABLE",
    }


def test_as_many_files_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        devices.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def descriptors_of_group(ranks: int) -> int:
    """The most descriptors of a lazy gloo group on a rank that all-gathers, broadcasts, reduces and waits at barriers:
    five, plus its neighbours in rings and trees."""
    return 5 + 4 * (ranks - 1).bit_length()


def descriptors_of_gloo(rank: int, world_size: int) -> tuple[int, int]:
    """Added descriptors: of the world's group after the collectives that megalite runs on gloo, and of a group along an
    axis."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    dist.init_process_group("gloo")
    first = _descriptors()
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, rank)
    dist.broadcast_object_list([rank])
    dist.all_reduce(torch.ones(1000))
    dist.barrier()
    used = _descriptors()
    dist.new_group(backend="gloo")
    return used - first + 5, _descriptors() - used


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_of_a_rank_at_1024() -> None:
    """On GPUs gloo has the group of the world and the saver's. Only rank 0, which hosts the store and gathers the plans
    of a checkpoint, has a connection to each rank; raise_open_files is for rank 0."""
    ranks = 8
    for used, unused in run_ranks(ranks, descriptors_of_gloo, init=False)[1:]:
        assert used <= descriptors_of_group(ranks)
        assert unused <= 5, "a group is connected before its first message"
    assert 2 * descriptors_of_group(1024) <= 200


def test_torchs_timeout_is_above_every_limit() -> None:
    limits = Limits.model_validate({"checkpoint_seconds": 5000})
    assert limits.collective_timeout.total_seconds() == 5300


@pytest.mark.parametrize("gpus", range(10))
def test_the_quickstart_fits_its_grid_to_the_gpus(gpus: int) -> None:
    words = subprocess.check_output(
        ["bash", "-c", f"source tools/environment.sh; quickstart_grid {gpus}"],
        cwd=REPOSITORY,
        text=True,
    )
    ranks, pipe, tensor = map(int, words.split())
    assert ranks <= gpus or (gpus, ranks) == (0, 8)
    accumulation = 4 // (ranks // pipe // tensor)
    keys = [f"megalite.parallel.pipe={pipe}", f"megalite.parallel.tensor={tensor}"]
    config = load_config(
        REPOSITORY / "ds_configs/quickstart.json",
        [*keys, f"gradient_accumulation_steps={accumulation}"],
    )
    assert config.resolve(ranks).train_batch_size == 32


def test_slurm_gives_a_rank_its_share_of_the_cores(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-1\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    for cores, wanted in {"96": 12, "4": 1}.items():
        env = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": "7",
            "SLURM_CPUS_ON_NODE": cores, "SLURM_NTASKS_PER_NODE": "8",
        }  # fmt: skip
        said = subprocess.check_output(
            ["bash", "launcher/slurm.sh", "--check"], cwd=REPOSITORY, env=env, text=True
        )
        assert said.startswith(f"--cpus-per-task={wanted} --kill-on-bad-exit=1 ")


def numerics(rank: int, world_size: int) -> tuple[bool, ...]:
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    devices.use_exact_products()
    devices.be_deterministic()
    return (
        not matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        not matmul.allow_bf16_reduced_precision_reduction
        and not matmul.allow_fp16_reduced_precision_reduction,
        os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Ring",
    )


def test_sums_in_fp32_and_in_one_order() -> None:
    assert run_ranks(1, numerics) == [(True, True, True, True)]


def what_a_start_sets(rank: int, world_size: int) -> dict[str, Any]:
    """The settings of a rank as start_ranks leaves them; the variables are those of GPUs."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most - 1), most))
    for name in library_settings({}, on_gpu=True, interface="eth0"):
        os.environ.pop(name, None)
    with (
        patch.object(launch, "machine_has_gpu", lambda: True),
        patch.object(launch, "_after_devices", lambda store, here, visible, prepare: prepare),
    ):
        launch.start_ranks(lambda thorough: None, lambda prepared: timedelta(seconds=4321))
    assert dist.group.WORLD is not None
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    matmul = torch.backends.cuda.matmul
    return {
        "files": resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most),
        "timeout": options._timeout.total_seconds(),
        "in fp32": not matmul.allow_bf16_reduced_precision_reduction
        and not matmul.allow_fp16_reduced_precision_reduction,
        "variables": {
            name: os.environ.get(name) for name in library_settings({}, on_gpu=True, interface="lo")
        },
    }


def test_a_start_makes_these_settings() -> None:
    for found in run_ranks(2, what_a_start_sets, init=False):
        assert found["files"] and found["in fp32"] and found["timeout"] == 4321
        assert found["variables"] == library_settings({}, on_gpu=True, interface="lo")


def test_the_key_makes_a_run_deterministic(tmp_path: Path) -> None:
    """On a CPU it changes no result, and every operation has a deterministic implementation."""
    of = functools.partial(document, tmp_path, layout={"zero": 1})
    runs: list[Any] = [(of(run="a", train={"steps": 2}), nothing)]
    runs.append((of(run="b", train={"steps": 2, "deterministic": True}), nothing))
    assert run_ranks(2, train, runs) == [[0, 0]] * 2
    losses = [[row["loss"] for row in rows(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1] and run_ranks(2, trained_deterministically, runs[1:]) == [
        True,
        True,
    ]


def trained_deterministically(rank: int, world_size: int, runs: list[Any]) -> bool:
    train(rank, world_size, runs)
    return torch.are_deterministic_algorithms_enabled()


def test_ranks_on_a_cpu_beside_gpus_measure_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DS_ACCELERATOR=cpu on a machine with GPUs, events on the GPUs would not measure the ranks' work."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    clock = Clock()
    clock.on = True
    with clock.computing():
        pass
    assert 0 < clock.take() < 1
    assert Screen(1, 0, 1)._memory_gib() > 0
