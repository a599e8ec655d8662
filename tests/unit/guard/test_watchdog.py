"""Which rank ended a run, from the files that ranks wrote (megalite/guard/watchdog.py), without ranks."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megalite.guard import watchdog
from megalite.guard.flight import Flight, Stay
from megalite.guard.watchdog import SUMMARY, Watchdog, _collective, _ranks

BUSY, FAILED, WAITS = (
    "was busy |  | data",
    "failed |  | step, for 3 s",
    "waited for others | {} | x",
)


def summary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[int, str],
    killed: frozenset[int] = frozenset(),
    flights: dict[int, Flight] | None = None,
) -> list[str]:
    """Lines about four ranks on two hosts."""
    made: Any = Watchdog.__new__(Watchdog)
    made.hosts, made.folder = ["a", "a", "b", "b"], tmp_path
    monkeypatch.setattr(watchdog, "killed_ranks", lambda: killed)
    made._sum_up({rank: (line, (flights or {}).get(rank, {})) for rank, line in said.items()})
    return (tmp_path / SUMMARY).read_text().splitlines()


def test_a_rank_that_failed_is_named_with_those_that_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {0: WAITS.format("2"), 1: WAITS.format("0,2"), 2: FAILED, 3: WAITS.format("1")}
    lines = summary(tmp_path, monkeypatch, said)
    assert lines[0] == "rank 2 on b failed; ranks 0, 1 waited for it"
    assert lines[1:] == [
        "rank 0 on a: x",
        "rank 1 on a: x",
        "rank 2 on b: step, for 3 s",
        "rank 3 on b: x",
    ]
    assert f"{lines[0]}: see {tmp_path / SUMMARY} and the stacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "killed", "head"),
    [
        ({0: FAILED, 1: BUSY, 2: BUSY}, frozenset({3}), "rank 3 on b was killed"),
        ({0: FAILED, 1: BUSY, 2: BUSY}, frozenset(), "rank 0 on a failed"),
        ({0: BUSY, 1: BUSY, 2: BUSY}, frozenset(), "rank 3 on b did not report"),
        (
            {0: FAILED, 1: FAILED, 2: WAITS.format("0"), 3: WAITS.format("1")},
            frozenset(),
            "rank 0 on a, rank 1 on a failed; ranks 2, 3 waited for them",
        ),
        ({rank: BUSY for rank in range(4)}, frozenset(), "rank 0 on a, rank 1 on a, rank 2 on b, "),
        ({rank: WAITS.format("") for rank in range(4)}, frozenset(), "rank 0 on a, rank 1 on a, "),
    ],
)
def test_the_likeliest_cause_comes_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[int, str],
    killed: frozenset[int],
    head: str,
) -> None:
    assert summary(tmp_path, monkeypatch, said, killed)[0].startswith(head)


def test_the_flight_recorder_decides_between_ranks_that_are_all_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL a rank may wait for its device in any call: rank 2 has not reached the sixth collective."""
    flights = {rank: {"w": Stay((0, 1, 2, 3), 6, 6, "all_reduce")} for rank in range(4)}
    flights[2] = {"w": Stay((0, 1, 2, 3), 5)}
    lines = summary(
        tmp_path, monkeypatch, dict.fromkeys(range(4), WAITS.format("")), flights=flights
    )
    late = "rank 2 on b had not reached the call that others waited in; ranks 0, 1, 3 waited for it"
    assert lines[0] == late


def test_the_first_summary_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SUMMARY).write_text("of the first\n")
    assert summary(tmp_path, monkeypatch, {0: FAILED}) == ["of the first"]


def test_a_lost_neighbour_counts_only_while_one_part_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the end of a run ranks exit one after another, which is no fault."""
    made: Any = Watchdog.__new__(Watchdog)
    made.node, made.alone_since = {(1, 11), (2, 12)}, -1.0
    alive = {(1, 11), (2, 12)}
    monkeypatch.setattr(made, "_neighbours", lambda: iter(alive))

    def looks(part: str, since: float) -> bool:
        made.part, made.since = part, since
        return made._is_left_alone()

    assert not any([looks("step 1", 1.0), looks("step 1", 1.0)])
    alive.remove((2, 12))
    assert [looks("step 1", 1.0), looks("the last checkpoint", 2.0), looks("", 2.0)] == [False] * 3
    assert [looks("step 3", 3.0), looks("step 3", 3.0)] == [False, True]


class Folder:
    """A run folder that counts how often it is looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def exists(self) -> bool:
        self.looks += 1
        return False


def looks_in_seconds(
    rank: int, gone: set[int], seconds: int, monkeypatch: pytest.MonkeyPatch
) -> int:
    """How often a rank looks for another node's fault. Four ranks on two hosts; the process of rank n is 100 + n."""
    now = [1000.0]

    def sleep(pause: float) -> None:
        now[0] += pause
        if now[0] > 1000 + seconds:
            raise TimeoutError

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    parents = {100 + other: -1 if other in gone else os.getppid() for other in range(4)}
    monkeypatch.setattr(watchdog, "parent_of", parents.get)
    made: Any = Watchdog.__new__(Watchdog)
    made.rank, made.hosts, made.pids = rank, ["a", "a", "b", "b"], [100, 101, 102, 103]
    made.has_failed, made.part, made.since, made.limit = False, "", 0.0, float("inf")
    made.signals, made.folder = SimpleNamespace(peer_lost=False), Folder()
    made.node, made.alone_since = {*made._neighbours()}, -1.0
    with pytest.raises(TimeoutError):
        made._watch()
    return made.folder.looks


def test_one_rank_of_each_node_looks_at_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest that is alive, at most once a second."""
    looks = [looks_in_seconds(rank, set(), 30, monkeypatch) for rank in range(4)]
    assert looks[1] == looks[3] == 0 and 15 <= looks[0] == looks[2] <= 30
    assert looks_in_seconds(1, {0}, 30, monkeypatch) == looks[0]


def frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def test_the_innermost_call_of_torch_distributed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 5, 6])
    called: dict[str, Any] = {"found": None}
    code = """
def recv(tensor, src=None, group=None):
    called["found"] = collective(frames(), 5)

def all_reduce(tensor, group=None):
    called["found"] = collective(frames(), 5)

def _reduce(tensor, group=None):
    called["found"] = collective(frames(), 5)
"""
    names: dict[str, Any] = {"called": called, "collective": _collective, "frames": frames}
    exec(compile(code, "/x/distributed_c10d.py", "exec"), names)
    names["recv"](None, 6)
    assert called["found"] == ("recv", [6])
    names["all_reduce"](None, "group")
    assert called["found"] == ("all_reduce", [4, 6])
    names["_reduce"](None)
    assert called["found"] == ("", [])
    assert _ranks([3]) == "rank 3" and _ranks([3, 4]) == "ranks 3, 4"
