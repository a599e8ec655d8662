"""Which ranks a rank waits for under NCCL, from torch's flight recorder: with NCCL the host does not block in a call of
torch.distributed.

The recorder is a ring buffer of the last collectives and messages of a process, each with its number in its group and
its state. A rank waits in the lowest incomplete number of a group, for the members that have not reached that number:
whose host has not queued it, or, if TORCH_NCCL_ENABLE_TIMING=1, whose device has not begun it. Hosts may be a step
ahead of their devices, so only the latter finds a device that is stuck. Guilty are ranks that others wait for and that
wait for nobody. Each rank's state is a value (`Flight`), small enough for a report, and the judgement is a pure
function of all ranks' values. Next: watchdog.py.
"""

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch._C import _distributed_c10d

# As in nccl:send 0->1, by ranks of the group.
_MESSAGE = re.compile(r"\w+:(send|recv) (\d+)(->|<-)(\d+)")


@dataclass(frozen=True)
class Stay:
    """The state of a rank in one group. members: global ranks. last: the highest number of a collective that it has
    reached. waits_in, name: the lowest incomplete one, None if there is none. messages: incomplete ones, as pairs of
    ("send" or "recv", global rank)."""

    members: tuple[int, ...]
    last: int
    waits_in: int | None = None
    name: str = ""
    messages: tuple[tuple[str, int], ...] = ()


Flight = dict[str, Stay]
"""A rank's state in each group, by the group's name."""


def flight_of(trace: Mapping[str, Any], timed: bool = False) -> Flight:
    """The state of a rank from its trace in the recorder's format (version 2). timed: whether NCCL's communicators
    record when a device begins a collective; those that it has not begun are then left out."""
    configured = {
        name: json.loads(group["ranks"]) for name, group in trace.get("pg_config", {}).items()
    }
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for entry in trace["entries"]:
        if not (timed and entry["state"] == "scheduled" and not entry["retired"]):
            entries.setdefault(entry["process_group"][0], []).append(entry)
    return {
        name: _stay(configured[name], some)
        for name, some in entries.items()
        if configured.get(name)
    }


def _stay(members: list[int], entries: Iterable[Mapping[str, Any]]) -> Stay:
    last, waits_in, name = 0, None, ""
    messages: list[tuple[str, int]] = []
    for entry in entries:
        complete = entry["retired"] or entry["state"] == "completed"
        if not entry["is_p2p"]:
            number = entry["collective_seq_id"]
            last = max(last, number)
            if not complete and (waits_in is None or number < waits_in):
                waits_in, name = number, entry["profiling_name"].partition(":")[2]
        elif not complete and (found := _MESSAGE.match(entry["profiling_name"])):
            kind, _, _, peer = found.groups()
            messages.append((kind, members[int(peer)]))
    return Stay(tuple(members), last, waits_in, name, tuple(messages))


def own_flight() -> Flight:
    """The state of this process; empty if torch has no NCCL, or if its recorder is off or fails."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None)
    if dump is not None:
        with contextlib.suppress(Exception):  # unknown format: report the rest
            trace = dump(includeCollectives=True, includeStackTraces=False, onlyActive=False)
            timed = os.environ.get("TORCH_NCCL_ENABLE_TIMING") == "1"
            return flight_of(pickle.loads(trace), timed)
    return {}


def waited_for(flights: Mapping[int, Flight]) -> dict[int, set[int]]:
    """For each rank, the ranks that it waits for. A rank without a flight has reached nothing."""
    return {rank: _waited_for(rank, flights) for rank in flights}


def _waited_for(rank: int, flights: Mapping[int, Flight]) -> set[int]:
    found: set[int] = set()
    for name, stay in flights[rank].items():
        theirs = {peer: flights.get(peer, {}).get(name) for peer in stay.members if peer != rank}
        if stay.waits_in is not None:
            found |= {
                peer
                for peer, other in theirs.items()
                if other is None or other.last < stay.waits_in
            }
        for kind, peer in stay.messages:
            other, matching = theirs.get(peer), ("recv" if kind == "send" else "send", rank)
            if other is None or matching not in other.messages:
                found.add(peer)
    return found


def guilty(flights: Mapping[int, Flight]) -> set[int]:
    """Ranks that others wait for and that wait for nobody; if all of them wait for one another, all that are waited
    for. Empty if nobody waits, or if all have reached the incomplete collective: then the network is at fault."""
    waits = waited_for(flights)
    named = {peer for peers in waits.values() for peer in peers}
    return {rank for rank in named if not waits.get(rank)} or named


def to_text(flight: Flight) -> str:
    """A flight as one line of JSON."""
    return json.dumps({name: asdict(stay) for name, stay in flight.items()})


def from_text(line: str) -> Flight:
    """The inverse of `to_text`."""
    return {
        name: Stay(
            **value
            | {"members": tuple(value["members"]), "messages": tuple(map(tuple, value["messages"]))}
        )
        for name, value in json.loads(line).items()
    }


def in_words(flight: Flight) -> str:
    """The collectives and messages that the rank waits in; empty if there are none."""
    said = [f"{stay.name} {stay.waits_in} of ranks {', '.join(map(str, stay.members))}" for stay in flight.values()
            if stay.waits_in is not None]  # fmt: skip
    said += [f"{kind} {'to' if kind == 'send' else 'from'} rank {peer}"
             for stay in flight.values() for kind, peer in stay.messages]  # fmt: skip
    return "; ".join(said)
