"""The lock of a run folder: its holder, holders that are gone, and that exactly one of several starts gets it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import ConfigError
from megalite.training.lock import FILE, Holder, take_lock
from tests.ranks import REPOSITORY
from tests.small_disk import fill, small_disk

PROGRAM = """
import sys, time
from pathlib import Path
from megalite.errors import ConfigError
from megalite.ranks.run_program import run_program
from megalite.ranks.signals import listen
from megalite.training import lock

lock.BEAT_SECONDS, lock.PATIENCE_SECONDS = 0.2, 1.0

def main(arguments):
    folder, until, deferred = arguments
    signals = listen()
    if deferred:
        signals.defer()
    time.sleep(max(0.0, float(until) - time.time()))
    lock.take_lock(Path(folder))
    print("taken", flush=True)
    while not signals.stop:
        time.sleep(0.01)
        if sys.stdin.readable() and "end" in sys.stdin.readline():
            return 0
    return 128 + signals.stop

run_program(main)
"""


class Starts:
    """Processes that take the lock of a folder, as rank 0 of a start does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, list[subprocess.Popen[str]]()

    def begin(
        self, at: float = 0.0, deferred: bool = False, **variables: str
    ) -> "subprocess.Popen[str]":
        pipes: Any = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder), str(at), "x" * deferred],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables, text=True, **pipes,
        )  # fmt: skip
        self.made.append(process)
        return process

    def holding(self, **variables: str) -> "subprocess.Popen[str]":
        """A start that has the lock."""
        process = self.begin(**variables)
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        return process

    @property
    def path(self) -> Path:
        return self.folder / FILE

    @property
    def pid(self) -> int:
        return json.loads(self.path.read_text())["pid"]


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    made = Starts(tmp_path)
    yield made
    for process in made.made:
        process.kill()
        process.communicate()


def ended(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """A process's exit code and the lines of its standard error."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said.splitlines()


def refusal(starts: Starts, pid: int) -> str:
    holder = Holder.read(starts.path.read_text())
    assert holder is not None and holder.pid == pid
    rule = f"one start at a time: stop that one, choose another folder, or remove {starts.path} if it is gone"
    return f"-c: megalite.train.run_dir: {starts.folder}: in use by {holder}: {rule}"


def test_a_second_start_is_refused_until_the_first_has_ended(starts: Starts) -> None:
    first = starts.holding()
    before = starts.path.read_text()
    assert ended(starts.begin()) == (2, [refusal(starts, first.pid)])
    assert starts.path.read_text() == before
    assert (
        first.communicate("end\n", timeout=30)
        and first.returncode == 0
        and not starts.path.exists()
    )
    assert starts.holding().pid == starts.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_released_when_a_signal_ends_the_start(starts: Starts, number: int) -> None:
    one = starts.holding()
    one.send_signal(number)
    assert ended(one)[0] == 128 + number and os.listdir(starts.folder) == []


def test_a_killed_start_leaves_no_lock_in_force(starts: Starts) -> None:
    """Also before its parent has waited for it, while the dead process still has a PID."""
    one = starts.holding()
    one.kill()
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{one.pid}").exists()
    assert starts.holding().pid == starts.pid != one.pid


def written(starts: Starts, **fields: Any) -> Holder:
    """Writes the lock of this process, with some fields changed."""
    holder = dataclasses.replace(Holder.this(starts.folder), **fields)
    starts.path.write_text(json.dumps(asdict(holder)))
    return holder


def test_another_process_of_the_same_number_is_not_taken_for_the_holder(starts: Starts) -> None:
    written(starts)
    assert ended(starts.begin())[0] == 2
    written(starts, born=1)
    assert starts.holding().pid == starts.pid


def test_a_copy_of_a_folder_in_use_is_not_in_use(starts: Starts, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    written(starts, folder=str(tmp_path / "original"))
    assert starts.holding().pid == starts.pid


@pytest.mark.parametrize(
    "where", [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "pid:[1]"}]
)
def test_the_lock_of_another_machine_is_watched_for_updates(
    starts: Starts, where: dict[str, str]
) -> None:
    holder = written(starts, **where)
    os.utime(starts.path, (0, 0))
    second = starts.begin()
    assert second.stderr is not None
    waits = f"{starts.path}: held by {holder}: waiting up to 1 s for a heartbeat\n"
    assert second.stderr.readline() == waits
    os.utime(starts.path)
    assert ended(second) == (2, [refusal(starts, os.getpid())])
    began = time.monotonic()
    third = starts.holding()
    assert third.pid == starts.pid and time.monotonic() - began > 1
    third.stdin.write("end\n")  # type: ignore[union-attr]
    assert ended(third) == (0, [waits.strip()])


@pytest.mark.parametrize(
    "first, second",
    [
        ({"MEGALITE_LAUNCH": "/tmp/megalite-ab-1"}, {"MEGALITE_LAUNCH": "/tmp/megalite-ab-2"}),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_a_later_start_by_the_same_launcher_takes_it_over(
    starts: Starts, first: dict[str, str], second: dict[str, str]
) -> None:
    """The launcher has given up the earlier start, which may hang."""
    one = starts.holding(**first)
    assert ended(starts.begin(**first))[0] == 2
    one.send_signal(signal.SIGSTOP)
    other = starts.holding(**second)
    holder = Holder.read(starts.path.read_text())
    one.send_signal(signal.SIGCONT)
    line = f"-c: megalite.train.run_dir: {starts.folder}: taken over by {holder}: this start exits"
    assert ended(one) == (1, [line])
    assert starts.pid == other.pid


def test_a_file_that_was_removed_by_hand_is_written_again(starts: Starts) -> None:
    one = starts.holding()
    starts.path.unlink()
    deadline = time.monotonic() + 10
    while not starts.path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert starts.pid == one.pid


@pytest.mark.parametrize("stale", ["", '{"pid": "x"}', "gone"])
def test_of_many_starts_one_gets_a_stale_lock(starts: Starts, stale: str) -> None:
    if stale == "gone":
        written(starts, pid=2**22 + 1)
    else:
        starts.path.write_text(stale)
    at = time.time() + 2
    many = [starts.begin(at) for _ in range(8)]
    deadline = time.monotonic() + 30
    while (
        len(refused := [one for one in many if one.poll() is not None]) < 7
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert [process.returncode for process in refused] == [2] * 7
    (left,) = set(many) - set(refused)
    assert starts.pid == left.pid and os.listdir(starts.folder) == [FILE]


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match="run_dir: .*: lock cannot be used: Is a directory"):
        take_lock(tmp_path)
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk / "filler")
        with pytest.raises(
            ConfigError, match="run_dir: .*: lock cannot be used: No space left on device"
        ):
            take_lock(disk)
        assert os.listdir(disk) == ["filler"]
    assert not any(thread.name == "lock" for thread in threading.enumerate())
