"""Kills, full disks and errors at every operation of the writer: a good checkpoint always exists, and all ranks agree.
Small boxes without an engine; whole runs are in test_checkpoint_runs.py and tests/launch/test_kills.py."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.checkpoint.boxes import Box
from megalite.checkpoint.files import Checkpoint, checkpoints_of, newest_good, step_of
from megalite.checkpoint.parts import BoxDict
from megalite.checkpoint.save import Saver, failure_line, owned_boxes
from megalite.checkpoint.storage import SaveFailed
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, Shard
from tests.ranks import RankFailure, run_ranks
from tests.small_disk import small_disk
from tests.writer_points import kill_at, watch_writer

STATE: dict[str, Any] = {
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "seed": 1,
    "model": {"model_type": "gpt2"},
}
WORLD, COLUMNS = 2, 20_000  # 160 kB per rank
CLONE_NEWNS = 0x20000


def boxes(rank: int, step: int) -> BoxDict:
    """A tensor whose rows 0 and 1 are rank 0's, and so on; its values depend on the step."""
    values = torch.full((2, COLUMNS), float(step)) + torch.arange(COLUMNS)
    return {"weight/a": [Box((2 * WORLD, COLUMNS), (2 * rank, 0), values)]}


def save(saver: Saver, rank: int, step: int) -> None:
    saver.save(step, boxes(rank, step), {**STATE, "step": step})
    saver.wait()


def is_good(run: Path, steps: set[int]) -> int:
    """The step of the newest good checkpoint, which must be one of these steps and have that step's values."""
    path, damaged = newest_good(run)
    assert path is not None, (damaged, sorted(os.listdir(run / "checkpoints")))
    checkpoint = Checkpoint.open(path)
    step = checkpoint.state["step"]
    assert step in steps
    assert torch.equal(
        checkpoint.read("a"), boxes(0, step)["weight/a"][0].values[:1].expand(2 * WORLD, COLUMNS)
    )
    return step


def saves_after(run: Path) -> None:
    """A later start's save, by one process: it removes leftovers of a kill, and older checkpoints."""
    saver = Saver(run, keep=1)
    whole = boxes(0, 9)["weight/a"][0].values[:1].expand(2 * WORLD, COLUMNS).contiguous()
    saver.save(9, {"weight/a": [Box((2 * WORLD, COLUMNS), (0, 0), whole)]}, {**STATE, "step": 9})
    saver.wait()
    assert is_good(run, {9}) == 9
    assert sorted(os.listdir(run / "checkpoints")) == ["latest", "step_00000009"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000009\n"


def copy_at_each_point(rank: int, world_size: int, run: Path, copies: Path) -> None:
    """Saves 2 (which removes 1) and 2 again (which replaces it); before each operation of the writer the folder
    is copied, in the state in which a kill of all ranks would leave it."""
    saver = Saver(run, keep=1)
    save(saver, rank, 1)
    dist.barrier()

    def copy(number: int, operation: str, argument: Any) -> None:
        shutil.copytree(
            run, copies / f"rank{rank}_{number:03d}_{operation}", ignore_dangling_symlinks=True
        )

    def careful(number: int, operation: str, argument: Any) -> None:
        for _ in range(5):  # the other rank changes the folder meanwhile
            try:
                return copy(number, operation, argument)
            except (shutil.Error, FileNotFoundError):
                shutil.rmtree(copies / f"rank{rank}_{number:03d}_{operation}", ignore_errors=True)

    watch_writer(careful)
    save(saver, rank, 2)
    save(saver, rank, 2)


def test_a_kill_at_any_point_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    run, copies = tmp_path / "run", tmp_path / "copies"
    copies.mkdir()
    run_ranks(WORLD, copy_at_each_point, run, copies)
    seen = set()
    for number, left in enumerate(sorted(copies.iterdir())):
        seen.add((left.name.split("_", 2)[2], is_good(left, {1, 2})))
        if number % 4 == 0:
            saves_after(left)
    operations = {operation for operation, _ in seen}
    assert operations == {
        "open",
        "write",
        "fsync",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
    }
    assert {("os.rename", 1), ("os.rename", 2)} <= seen and len(list(copies.iterdir())) > 60


def killed(rank: int, world_size: int, run: Path, victims: list[int], point: int) -> bool:
    """Kills the victims at a point of the first one's writer. Returns whether the save completed."""
    pids = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    saver = Saver(run, keep=1)
    save(saver, rank, 1)
    dist.barrier()
    if rank == victims[0]:
        watch_writer(kill_at(point, [pids[victim] for victim in victims]))
    save(saver, rank, 2)
    dist.barrier()
    return True


def kill(folder: Path, victims: list[int], point: int) -> bool:
    """Returns whether that point exists."""
    run = folder / f"{victims}{point}"
    try:
        run_ranks(WORLD, killed, run, victims, point)
        return False
    except RankFailure as failure:
        assert "exit code -9" in str(failure), failure
    is_good(run, {1, 2})
    saves_after(run)
    shutil.rmtree(run)
    return True


def test_killed_ranks_leave_a_good_checkpoint(tmp_path: Path) -> None:
    for victims, point in (([0, 1], 4), ([0], 8), ([1], 1), ([0, 1], 15), ([1, 0], 2), ([0], 25)):
        assert kill(tmp_path, victims, point)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ranks_killed_at_every_point_leave_a_good_checkpoint(tmp_path: Path) -> None:
    points = {}
    for victims in ([0, 1], [0], [1], [1, 0]):
        point = 0
        while kill(tmp_path, victims, point):
            point += 1
        points[tuple(victims)] = point
    print(f"kills at points of the writer: {points}")
    assert points[0, 1] == points[0,] > 25 and points[1, 0] == points[1,] >= 3


ONE_BOX: BoxDict = {"weight/a": [Box((2, 3), (0, 0), torch.ones(2, 3))]}


def saver_of(run: Path, steps: tuple[int, ...]) -> Saver:
    """A Saver that has saved these steps, and from now on keeps one."""
    saver = Saver(run, keep=0)
    for step in steps:
        saver.save(step, ONE_BOX, {**STATE, "step": step})
        saver.wait()
    return Saver(run, keep=1)


def log_operations(rank: int, world_size: int, run: Path) -> list[tuple[str, str]]:
    log: list[tuple[str, str]] = []

    def note(number: int, operation: str, argument: Any) -> None:
        if isinstance(argument, int):
            argument = os.readlink(f"/proc/self/fd/{argument}")
        log.append((operation, str(argument)))

    watch_writer(note)
    save(Saver(run, keep=1), rank, 1)
    return log


def test_nothing_becomes_visible_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """After a power failure only flushed data exists: files, then their names, then the rename."""
    first, second = run_ranks(WORLD, log_operations, tmp_path)
    folder = tmp_path / "checkpoints"
    published = next(i for i, (o, path) in enumerate(first) if o == "os.rename" and path.endswith(".partial")
                     and "step" in path)  # fmt: skip
    partial = first[published][1]
    for log, names in ((first[:published], ("tensors_00000.safetensors", "state.json", "index.json", "SHA256SUMS")),
                       (second, ("tensors_00001.safetensors",))):  # fmt: skip
        for name in names:
            of_file = [operation for operation, path in log if path == f"{partial}/{name}"]
            assert of_file[0] == "open" and "write" in of_file and of_file[-1] == "fsync", (
                name,
                of_file,
            )
    assert first[published - 1] == ("fsync", partial)
    assert ("fsync", str(folder)) in first[published : published + 3]
    assert ("fsync", str(tmp_path)) in first[:published]  # the name `checkpoints` itself
    latest = [i for i, (operation, path) in enumerate(first) if "latest" in path]
    assert latest[0] > published and first[-1] == ("fsync", str(folder))


def refused(rank: int, world_size: int, run: Path, point_step: int) -> int:
    """Lets every operation of each rank's writer fail in turn. Returns how many there were."""
    state = {"at": -1}

    def refuse(number: int, operation: str, argument: Any) -> None:
        state["seen"] = state.get("seen", -1) + 1
        if state["seen"] == state["at"]:
            raise OSError(
                28 if number % 2 else 5,
                "No space left on device" if number % 2 else "Input/output error",
            )

    watch_writer(refuse)
    saver, step, refusals = Saver(run, keep=2), 1, 0
    save(saver, rank, step)
    for victim in range(world_size):
        for point in range(0, 1000, point_step):
            step += 1
            state.update(at=point if rank == victim else -1, seen=-1)
            try:
                save(saver, rank, step)
                failed = ""
            except SaveFailed as error:
                failed = failure_line(error)
                assert f"rank {victim}: [Errno " in failed, failed
            everyone: list[Any] = [None] * world_size
            dist.all_gather_object(
                everyone, (failed, state["seen"] >= point and rank == victim, list(saver.lines))
            )
            assert len({outcome for outcome, _, _ in everyone}) == 1, everyone
            standing = [Checkpoint.open(path).state["step"] for path in checkpoints_of(run)]
            good = is_good(run, {step} if not failed else {step - 1, step, *standing})
            assert good == step or failed
            assert standing  # more than `keep` if the failure came after it had appeared
            dist.barrier()
            saver.lines.clear()
            if not any(reached for _, reached, _ in everyone):
                break
            refusals += 1
        dist.barrier()
        assert len(checkpoints_of(run)) == 2
    return refusals


@pytest.mark.parametrize("point_step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_an_operation_that_fails_on_one_rank_is_every_rank_s_word(
    tmp_path: Path, point_step: int
) -> None:
    counts = run_ranks(WORLD, refused, tmp_path / "run", point_step)
    assert counts[0] == counts[1] >= 30 // point_step


def disk_is_full(rank: int, world_size: int, run: Path) -> None:
    """The folder's disk has room for two checkpoints, and all are to be kept."""
    saver = Saver(run, keep=0)
    save(saver, rank, 1)
    save(saver, rank, 2)
    for step in (3, 4):
        with pytest.raises(SaveFailed) as raised:
            save(saver, rank, step)
        assert "No space left on device" in failure_line(raised.value)
        dist.barrier()
        assert [path.name for path in checkpoints_of(run)] == ["step_00000001", "step_00000002"]
        assert is_good(run, {2})
    dist.barrier()
    if rank == 0:
        assert sorted(os.listdir(run / "checkpoints")) == [
            "latest",
            "step_00000001",
            "step_00000002",
        ]
        shutil.rmtree(run / "checkpoints" / "step_00000001")
    dist.barrier()
    save(saver, rank, 5)
    is_good(run, {5})


def room_is_made(rank: int, world_size: int, run: Path) -> None:
    """On the same disk, with three to be kept: the oldest is removed before the third is written, and the newest good
    one stays even if that leaves no room."""
    shutil.rmtree(run, ignore_errors=True)
    dist.barrier()
    saver = Saver(run, keep=3)
    for step in (1, 2, 3, 4):
        save(saver, rank, step)
        dist.barrier()
        assert [step_of(path) for path in checkpoints_of(run)] == (
            [step - 1, step] if step > 1 else [1]
        )
        assert is_good(run, {step})
        dist.barrier()
    removed = [line.partition(": ")[0] for line in saver.lines]
    assert removed == (
        [str(run / "checkpoints" / f"step_0000000{step}") for step in (1, 2)] if rank == 0 else []
    )
    saver = Saver(run, keep=3)  # a later start, from the older one of the two: the newer is damaged
    saver.starts_from(3, {"step_00000004"})
    if rank == 0:
        (run / "checkpoints" / "step_00000004" / "index.json").write_text("{}")
    dist.barrier()
    with pytest.raises(SaveFailed) as raised:
        save(saver, rank, 5)
    assert "No space left on device" in failure_line(raised.value)
    dist.barrier()
    assert [path.name for path in checkpoints_of(run)] == ["step_00000003", "step_00000004"]
    assert is_good(run, {3}) and saver.lines == []
    dist.barrier()


def folder_is_read_only_on_rank_1(rank: int, world_size: int, run: Path) -> None:
    run.mkdir(exist_ok=True)
    dist.barrier()
    saver = Saver(run, keep=1)
    if rank == 1:  # a mount namespace, shared by threads that start later
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        for command in (
            ["--make-rprivate", "/"],
            ["--bind", str(run), str(run)],
            ["-o", "remount,bind,ro", str(run)],
        ):
            subprocess.run(["mount", *command], check=True)
    if rank == 0:
        shutil.copytree(run.parent / "good", run / "checkpoints")
    dist.barrier()
    with pytest.raises(SaveFailed) as raised:
        save(saver, rank, 6)
    assert "rank 1: [Errno 30] Read-only file system" in failure_line(raised.value)
    dist.barrier()
    assert is_good(run, {5})
    if rank == 0:
        assert sorted(os.listdir(run / "checkpoints")) == [
            "latest",
            "step_00000002",
            "step_00000005",
        ]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk_and_a_folder_read_only_on_one_rank_lose_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "900k") as small:
        run_ranks(WORLD, room_is_made, small / "run")
        shutil.rmtree(small / "run")
        run_ranks(WORLD, disk_is_full, small / "run")
        shutil.copytree(small / "run" / "checkpoints", tmp_path / "good")
    run_ranks(WORLD, folder_is_read_only_on_rank_1, tmp_path / "run")


def no_room(rank: int, world_size: int, run: Path) -> None:
    """One rank has no room for its copy: all wait for the files, written from live tensors. Then each uses its own
    folder."""
    saver = Saver(run, keep=1, copy_limit_bytes=0 if rank == 1 else None)
    saver.save(1, boxes(rank, 1), {**STATE, "step": 1})
    assert saver.has_ended
    saver.wait()
    assert saver.taken_figures()["checkpoint_copy_bytes"] == 0
    saver = Saver(run, keep=1, copy_limit_bytes=1 << 20)
    live = boxes(rank, 2)
    saver.save(2, live, {**STATE, "step": 2})
    for box in live["weight/a"]:
        box.values.zero_()
    saver.wait()
    figures = saver.taken_figures()
    assert (
        figures["checkpoint_copy_bytes"] == 2 * COLUMNS * 4
        and figures["checkpoint_write_seconds"] > 0
    )
    assert figures["checkpoint_seconds"] > 0 and saver.taken_figures() == {}
    is_good(run, {2})
    with pytest.raises(SaveFailed) as raised:
        save(Saver(run / str(rank), keep=1), rank, 3)
    assert "rank 1: " in failure_line(raised.value) and "that all ranks share" in failure_line(
        raised.value
    )
    dist.barrier()
    assert list((run / "0" / "checkpoints").iterdir()) == []


def test_where_one_rank_has_no_room_for_its_copy_all_wait(tmp_path: Path) -> None:
    run_ranks(WORLD, no_room, tmp_path)


def more_ranks_than_elements(rank: int, world_size: int, run: Path) -> None:
    """Equal copies on three ranks of a tensor of two elements and one of five (ZeRO-0)."""
    grid, shards = Grid.at(rank, 1, world_size, 1), []
    for name, count in (("two", 2), ("five", 5)):
        place = Placement((count,), (), None, 0.0, counted=True, name=name)
        shards.append(Shard(place, 0, torch.arange(float(count)), {}))
    saver = Saver(run, keep=1)
    saver.save(1, owned_boxes(shards, grid, replicated=True), {**STATE, "step": 1})
    saver.wait()
    checkpoint = Checkpoint.open(run / "checkpoints" / "step_00000001")
    for shard in shards:
        assert torch.equal(checkpoint.read(shard.placement.name), shard.master)


def test_more_data_ranks_than_a_tensor_has_elements(tmp_path: Path) -> None:
    run_ranks(3, more_ranks_than_elements, tmp_path)


def test_a_damaged_later_checkpoint_is_put_aside_and_never_kept_for_a_good_one(
    tmp_path: Path,
) -> None:
    saver = saver_of(tmp_path, (1, 7))
    (tmp_path / "checkpoints" / "step_00000007" / "index.json").write_text("{}")
    path, damaged = newest_good(tmp_path)
    assert path is not None and path.name == "step_00000001" and "index.json" in str(damaged[0])
    saver.starts_from(1, {"step_00000007"})
    saver.save(4, ONE_BOX, {**STATE, "step": 4})
    saver.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "latest",
        "step_00000004",
        "step_00000007.damaged",
    ]
    assert "step_00000007: damaged and skipped: renamed to step_00000007.damaged" in saver.lines[0]
    assert newest_good(tmp_path)[1] == []


def test_a_later_checkpoint_that_was_not_found_damaged_is_left_alone(tmp_path: Path) -> None:
    """It belongs to another start of the same run, and this one has not checked it."""
    saver = saver_of(tmp_path, (1, 7))
    saver.starts_from(1, ())
    for step in (4, 5):
        saver.save(step, ONE_BOX, {**STATE, "step": step})
        saver.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "latest",
        "step_00000005",
        "step_00000007",
    ]
    assert newest_good(tmp_path) == (tmp_path / "checkpoints" / "step_00000007", [])
    (line,) = saver.lines
    assert line.endswith(
        "step_00000007: of a later step than 4 and not written by this start: left unchanged"
    )
