"""Simulates NCCL's order of point-to-point messages without NCCL: would these calls of torch.distributed all complete?

gloo never blocks a send, so a test on gloo cannot show a hang that NCCL would have. `Recorder` replaces
torch.distributed while one rank's real code runs, and records its calls; `stuck` simulates the calls of all ranks by
these rules (torch's ProcessGroupNCCL.cpp, `pointToPoint`; NCCL's documentation of ncclSend; NVIDIA/nccl#783):

- The calls of a rank on one communicator run one after another, on one stream. Without `device_id` in
  init_process_group ("lazy") an unbatched call takes the communicator of its two ranks, one for both directions; with
  it ("eager"), and in batch_isend_irecv, it takes the group's.
- A message completes when both its ends run. Up to `buffered` messages of each direction may leave before; a message
  larger than NCCL's buffers (a few MiB) cannot, so 0 is the case to pass.
- `recv` and `Work.wait` block the device's computing stream, not the host. A call starts after everything that the
  rank computed before it, and so after every message that was waited for before it.
- The first call on a lazy communicator blocks the host until the other rank makes one too.
- `synchronize` blocks the host until everything before it is done.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(eq=False)
class Message:
    """One end of a message: rank sends to or receives from peer, on a group."""

    rank: int
    peer: int
    sends: bool
    group: str
    started: bool = False
    done: bool = False


@dataclass(eq=False)
class Call:
    """A call that a host queues: messages (several when batched), a wait of the computing stream for an earlier call,
    or a wait of the host for everything before it."""

    kind: Literal["messages", "wait", "synchronize"]
    messages: list[Message] = field(default_factory=list)
    waits_for: "Call | None" = None
    batched: bool = False

    @property
    def done(self) -> bool:
        return all(message.done for message in self.messages)

    def communicator(self, lazy: bool) -> tuple[Any, ...]:
        """The communicator on which it runs."""
        first = self.messages[0]
        if lazy and not self.batched:
            return (first.group, *sorted((first.rank, first.peer)))
        return (first.group,)


class _Work:
    def __init__(self, call: Call, calls: list[Call]) -> None:
        self.call, self.calls = call, calls

    def is_completed(self) -> bool:
        return False  # tensors are kept for longer; no message depends on this

    def wait(self) -> None:
        self.calls.append(Call("wait", waits_for=self.call))


@dataclass
class Recorder:
    """Replaces the module torch.distributed on one rank. Received data is zeros."""

    rank: int
    calls: list[Call] = field(default_factory=list)

    def isend(self, tensor: Any, dst: int, group: Any = None) -> _Work:
        return self._note([Message(self.rank, dst, True, str(group))])

    def irecv(self, tensor: Any, src: int, group: Any = None) -> _Work:
        tensor.zero_()
        return self._note([Message(self.rank, src, False, str(group))])

    def recv(self, tensor: Any, src: int, group: Any = None) -> None:
        self.irecv(tensor, src, group).wait()

    def exchange(self, send: tuple[int, Any], receive: tuple[int, Any], group: Any = None) -> None:
        """batch_isend_irecv of one send and one receive, and the wait for them."""
        ends = [(send[0], True), (receive[0], False)]
        self._note(
            [Message(self.rank, peer, sends, str(group)) for peer, sends in ends], batched=True
        ).wait()

    def synchronize(self) -> None:
        self.calls.append(Call("synchronize"))

    def is_initialized(self) -> bool:
        return False

    def _note(self, messages: list[Message], batched: bool = False) -> _Work:
        self.calls.append(Call("messages", messages, batched=batched))
        return _Work(self.calls[-1], self.calls)


def stuck(ranks: Sequence[Sequence[Call]], lazy: bool, buffered: int = 0) -> list[str]:
    """What each rank is blocked in forever; empty if all calls complete."""
    for message in _messages(ranks):
        message.started = message.done = False
    hosts = [0] * len(ranks)  # number of calls that a rank's host has queued
    directions = _directions(ranks)
    moved = True
    while moved:
        moved = _queue(ranks, hosts, lazy)
        for rank, calls in enumerate(ranks):
            moved |= _start(calls[: hosts[rank]], lazy)
        for sends, receives in directions:
            moved |= _deliver(sends, receives, buffered)
    return [
        _blocked(rank, calls[: hosts[rank]])
        for rank, calls in enumerate(ranks)
        if not all(c.done for c in calls)
    ]


def _messages(ranks: Sequence[Sequence[Call]]) -> Iterator[Message]:
    return (message for calls in ranks for call in calls for message in call.messages)


def _directions(ranks: Sequence[Sequence[Call]]) -> list[tuple[list[Message], list[Message]]]:
    """Sends and receives of each direction of each pair on a group: the n-th send matches the n-th receive."""
    found: dict[Any, tuple[list[Message], list[Message]]] = defaultdict(lambda: ([], []))
    for message in _messages(ranks):
        way = (message.rank, message.peer) if message.sends else (message.peer, message.rank)
        found[message.group, way][0 if message.sends else 1].append(message)
    for way, (sends, receives) in found.items():
        assert len(sends) == len(receives), f"{way}: {len(sends)} sends, {len(receives)} receives"
    return list(found.values())


def _queue(ranks: Sequence[Sequence[Call]], hosts: list[int], lazy: bool) -> bool:
    """Moves each host as far as possible. Returns whether any moved."""
    moved = False
    for rank, calls in enumerate(ranks):
        while hosts[rank] < len(calls) and _host_passes(ranks, hosts, rank, lazy):
            hosts[rank] += 1
            moved = True
    return moved


def _host_passes(ranks: Sequence[Sequence[Call]], hosts: list[int], rank: int, lazy: bool) -> bool:
    """Whether the next call of a rank returns to its host."""
    call = ranks[rank][hosts[rank]]
    if call.kind == "synchronize":
        return all(before.done for before in ranks[rank][: hosts[rank]])
    if call.kind == "messages" and lazy and not call.batched:
        name, peer = call.communicator(lazy), call.messages[0].peer
        reached = ranks[peer][: hosts[peer] + 1]  # the call that the peer is blocked in counts
        return any(other.messages and other.communicator(lazy) == name for other in reached)
    return True


def _start(calls: Sequence[Call], lazy: bool) -> bool:
    """Starts the first unfinished call of each communicator, up to the first wait that is not over."""
    moved, busy = False, set()
    for call in calls:
        if call.waits_for is not None and not call.waits_for.done:
            break
        if call.done:
            continue
        name = call.communicator(lazy)
        if name not in busy:
            busy.add(name)
            for message in call.messages:
                moved |= not message.started
                message.started = True
    return moved


def _deliver(sends: list[Message], receives: list[Message], buffered: int) -> bool:
    moved, received = False, sum(message.done for message in receives)
    for number, (send, receive) in enumerate(zip(sends, receives, strict=True)):
        if send.started and receive.started and not receive.done:
            send.done = receive.done = moved = True
            received += 1
        elif send.started and not send.done and number < received + buffered:
            send.done = moved = True
    return moved


def _blocked(rank: int, calls: Sequence[Call]) -> str:
    running = []
    for number, call in enumerate(calls):
        for message in call.messages:
            if message.started and not message.done:
                what = (
                    f"send to {message.peer}" if message.sends else f"receive from {message.peer}"
                )
                running.append(f"call {number}: {what}")
    return f"rank {rank}: {', '.join(running) or 'nothing runs'}"
