"""Which rank causes a hang according to the flight recorder (megalite/guard/flight.py): traces that torch recorded of
gloo's collectives on forked ranks, and entries as ProcessGroupNCCL.cpp writes them."""

import os
import pickle
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from megalite.guard.flight import (
    Flight,
    Stay,
    flight_of,
    from_text,
    guilty,
    in_words,
    to_text,
    waited_for,
)
from tests.ranks import run_ranks


def entry(
    group: str,
    number: int,
    state: str = "started",
    name: str = "nccl:all_reduce",
    p2p: bool = False,
) -> Any:
    """The relevant fields of an entry."""
    return {
        "process_group": (group, "undefined"), "collective_seq_id": number, "p2p_seq_id": number if p2p else 0,
        "is_p2p": p2p, "profiling_name": name, "state": state, "retired": state == "completed",
    }  # fmt: skip


def flight(groups: dict[str, list[int]], *entries: Any, timed: bool = False) -> Flight:
    configured = {
        name: {"name": name, "desc": "undefined", "ranks": str(ranks)}
        for name, ranks in groups.items()
    }
    return flight_of(
        {"version": "2.10", "pg_config": configured, "pg_status": {}, "entries": list(entries)},
        timed,
    )


WORLD = {"0": [0, 1, 2, 3]}


def test_the_rank_that_has_not_come_is_guilty() -> None:
    """Rank 2's host is computing; the others have queued the next collective, and one of them also the one after."""
    waits = flight(WORLD, entry("0", 6, "completed"), entry("0", 7))
    further = flight(WORLD, entry("0", 6, "completed"), entry("0", 7), entry("0", 8, "scheduled"))
    flights = {0: waits, 1: further, 2: flight(WORLD, entry("0", 6, "completed")), 3: waits}
    assert waited_for(flights) == {0: {2}, 1: {2}, 2: set(), 3: {2}}
    assert guilty(flights) == {2}
    assert in_words(further) == "all_reduce 7 of ranks 0, 1, 2, 3"
    assert guilty({0: waits, 1: waits, 3: waits}) == {2}, "one that left no word"


def test_a_rank_that_waits_itself_is_not_guilty() -> None:
    """Pairs 0-1 and 2-3, then the world: 3 is late in its pair, so 2 waits for it, and the world waits for 2."""
    groups = WORLD | {"5": [0, 1], "6": [2, 3]}
    ahead = flight(groups, entry("5", 4, "completed"), entry("0", 9))
    held = flight(groups, entry("6", 4), entry("0", 8, "completed"))
    late = flight(groups, entry("6", 3, "completed"), entry("0", 8, "completed"))
    flights = {0: ahead, 1: ahead, 2: held, 3: late}
    assert waited_for(flights) == {0: {2, 3}, 1: {2, 3}, 2: {3}, 3: set()}
    assert guilty(flights) == {3}


def test_a_stuck_device_is_guilty_if_beginnings_are_recorded() -> None:
    """All hosts have queued the step's collectives and messages; rank 2's device does not come to its first."""
    last = [entry("0", 8, "scheduled"), entry("0", 1, "scheduled", "nccl:send 2->3", p2p=True)]
    flights = {}
    for timed in (False, True):
        waits = flight(WORLD, entry("0", 6, "completed"), entry("0", 7), *last, timed=timed)
        stuck = entry("0", 7, "scheduled")
        stuck = flight(WORLD, entry("0", 6, "completed"), stuck, *last, timed=timed)
        flights[timed] = {0: waits, 1: waits, 2: stuck, 3: waits}
    assert guilty(flights[True]) == {2} and not in_words(flights[True][2])
    assert 2 not in guilty(flights[False])


def test_messages_wait_for_their_other_end() -> None:
    """Ranks 4, 5, 6 are a pipeline: 5 waits for a gradient that 6 has not sent, and 4 for one from 5."""
    pipe = {"9": [4, 5, 6]}
    first = flight(pipe, entry("9", 1, "started", "nccl:recv 0<-1", p2p=True))
    middle = flight(pipe, entry("9", 1, "started", "nccl:recv 1<-2", p2p=True))
    last = flight(pipe, entry("9", 1, "completed", "nccl:send 2->1", p2p=True))
    assert waited_for({4: first, 5: middle, 6: last}) == {4: {5}, 5: {6}, 6: set()}
    assert guilty({4: first, 5: middle, 6: last}) == {6}
    assert in_words(first) == "recv from rank 5"


def test_complete_messages_blame_nobody_and_a_cycle_blames_everyone() -> None:
    pipe = {"9": [0, 1]}
    sends = flight(pipe, entry("9", 1, "started", "nccl:send 0->1", p2p=True))
    takes = flight(pipe, entry("9", 1, "started", "nccl:recv 1<-0", p2p=True))
    assert guilty({0: sends, 1: takes}) == set()
    also_sends = flight(pipe, entry("9", 1, "started", "nccl:send 1->0", p2p=True))
    assert guilty({0: sends, 1: also_sends}) == {0, 1}
    assert guilty({0: {}, 1: {}}) == set()


def test_a_ranks_report_is_one_line() -> None:
    told: Flight = {"0": Stay((0, 1), 7, 6, "all_reduce", (("send", 1),))}
    assert from_text(to_text(told)) == told and "\n" not in to_text(told)


def recorded(rank: int, world_size: int) -> Any:
    """torch's own trace of a rank; the last rank does not reach the third collective."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100"
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(world_size)))
    value = torch.ones(2)
    dist.all_reduce(value, group=group)
    dist.all_reduce(value, group=group)
    if rank < world_size - 1:
        dist.all_reduce(value, group=group, async_op=True)
        time.sleep(0.5)
    trace = _distributed_c10d._dump_fr_trace(  # type: ignore[attr-defined]
        includeCollectives=True, includeStackTraces=False, onlyActive=False
    )
    return pickle.loads(trace)


def test_traces_that_torch_recorded() -> None:
    traces = run_ranks(3, recorded, init=False)
    assert {trace["version"] for trace in traces} == {"2.10"}
    for trace in traces:
        trace["pg_config"] = {
            "1": {"name": "1", "desc": "undefined", "ranks": "[0, 1, 2]"}
        }  # gloo leaves it empty
    flights = {rank: flight_of(trace) for rank, trace in enumerate(traces)}
    assert flights[0]["1"].members == (0, 1, 2) and flights[0]["1"].name == "all_reduce"
    assert guilty(flights) == {2}
