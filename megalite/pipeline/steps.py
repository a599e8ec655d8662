"""The steps of a rank's host, in order: receive, act, send. All messages of a step have one global order.

NCCL runs the messages of one stream in order, and a send may wait until its receive runs (NVIDIA/nccl#783), so two
ranks that queue their messages in different orders can deadlock. Here all messages of a program are ordered by the
simulated time at which they are sent, and each rank queues its part of that order. Then the first incomplete message is
next on both of its ranks, whatever shares a stream, so something always moves. Receives are posted as early as the
order and `AHEAD` allow, so that a message travels while its rank computes.

`check_steps` simulates all ranks with one stream each and sends that wait for their receives. Next: cut.py.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megalite.programs.check import Cost, ProgramError, check, equal_costs
from megalite.programs.program import Action, Program, Value

AHEAD = 1  # a receive is posted this many actions before the one that needs it
IN_FLIGHT = 2  # incomplete sends that a rank of a forward-only program may have: back-pressure


class Receive(NamedTuple):
    """Post a receive of a value from a rank of the pipe axis."""

    value: Value
    source: int


class Act(NamedTuple):
    """Run an action as soon as its input is available."""

    action: Action


class Send(NamedTuple):
    """Send a value to a rank of the pipe axis."""

    value: Value
    target: int


class Wait(NamedTuple):
    """Wait until the send of a value is complete."""

    value: Value


Step = Receive | Act | Send | Wait


def steps_of(program: Program, cost: Cost = equal_costs) -> list[list[Step]]:
    """Each rank's steps. A forward-only program waits for sends, so that a fast rank does not run ahead of a slow one
    and accumulate unsent activations."""
    ends = check(program, cost).ends
    sent = [
        (ends[action], value)
        for _, action in program.all_actions()
        if (value := program.gives(action)) is not None and program.crosses(value)
    ]
    # Among messages of the same time, activations come first: their receives are then posted before a backward.
    order = {value: number for number, (_, value) in enumerate(sorted(sent))}
    forward_only = all(action.kind == "F" for _, action in program.all_actions())
    steps = [_Merger(program, rank, order).steps() for rank in range(program.ranks)]
    if forward_only:
        return [_with_waits(own, IN_FLIGHT) for own in steps]
    return [_with_receipts(own, program.receipts) for own in steps]


class _Merger:
    """Puts the messages of one rank between its actions. order: index of each message in the global order."""

    def __init__(self, program: Program, rank: int, order: dict[Value, int]) -> None:
        self.program, self.rank, self.order = program, rank, order
        self.actions = program.actions[rank]
        needed = [program.needs(action) for action in self.actions]
        self.user = {
            value: number
            for number, value in enumerate(needed)
            if value is not None and value in order
        }
        self.to_receive = deque(sorted(self.user, key=order.__getitem__))
        sent = [value for value in order if program.way(value)[0] == rank]
        self.to_send = deque(sorted(sent, key=order.__getitem__))
        self.result: list[Step] = []

    def steps(self) -> list[Step]:
        for number, action in enumerate(self.actions):
            self._post(number)
            self.result.append(Act(action))
            given = self.program.gives(action)
            if given is not None and given in self.order:
                self._post_before(self.order[given])
                assert self.to_send.popleft() == given, given
                self.result.append(Send(given, self.program.way(given)[1]))
        return self.result

    def _post(self, number: int) -> None:
        """Posts, before action `number`, the receive that it needs and all earlier ones in the global order, then those
        that the next `AHEAD` actions need, as far as the order allows."""
        needed = self.program.needs(self.actions[number])
        if needed is not None and needed in self.to_receive:
            self._post_before(self.order[needed] + 1)
        limit = self.order[self.to_send[0]] if self.to_send else len(self.order)
        while self.to_receive and self.order[self.to_receive[0]] < limit:
            if self.user[self.to_receive[0]] > number + AHEAD:
                break
            self._receive()

    def _post_before(self, limit: int) -> None:
        """The receives whose index in the global order is below `limit`."""
        while self.to_receive and self.order[self.to_receive[0]] < limit:
            self._receive()

    def _receive(self) -> None:
        value = self.to_receive.popleft()
        self.result.append(Receive(value, self.program.way(value)[0]))


def forward_stream(p: int, rank: int, numbers: Iterable[int], ahead: int = AHEAD) -> Iterator[Step]:
    """A rank's steps for successive forward passes through p chunks, one per rank, when the passes are not known
    beforehand: each number is read `ahead` passes before it is run. The steps are those of `forward_only`
    (schedules.py); every rank must get the same numbers."""
    ready: deque[int] = deque()
    under_way: deque[Value] = deque()

    def act(number: int) -> Iterator[Step]:
        yield Act(Action("F", rank, number))
        if rank < p - 1:
            if len(under_way) == IN_FLIGHT:
                yield Wait(under_way.popleft())
            under_way.append(Value("activation", rank + 1, number))
            yield Send(under_way[-1], rank + 1)

    for number in numbers:
        if rank > 0:
            yield Receive(Value("activation", rank, number), rank - 1)
        ready.append(number)
        if len(ready) > ahead:
            yield from act(ready.popleft())
    for number in ready:
        yield from act(number)


def _with_waits(steps: list[Step], most: int) -> list[Step]:
    """Adds a wait for the oldest send before each send that would exceed `most` incomplete ones."""
    under_way: list[Value] = []
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Send):
            if len(under_way) == most:
                result.append(Wait(under_way.pop(0)))
            under_way.append(step.value)
        result.append(step)
    return result


def _with_receipts(steps: list[Step], receipts: dict[Action, list[Value]]) -> list[Step]:
    """Adds a wait for each send once a message has proved that it arrived, so that the memory of what was sent does not
    grow with the number of micro-batches. gloo does not report a send as complete before it is waited for, and under
    NCCL the host is ahead of its device."""
    result: list[Step] = []
    for step in steps:
        result.append(step)
        if isinstance(step, Act):
            result += [Wait(value) for value in receipts.get(step.action, ())]
    return result


def check_steps(ranks: Sequence[Sequence[Step]]) -> None:
    """Raises ProgramError if a message has no other end, or if the ranks would hang under NCCL's strictest rules: one
    stream per rank for all its messages, and sends that complete only with their receive."""
    _check_ends(ranks)
    player = _Streams(ranks)
    while player.advance():
        pass
    if player.stuck:
        raise ProgramError("; ".join(player.stuck))


def _check_ends(ranks: Sequence[Sequence[Step]]) -> None:
    sent: dict[tuple[Value, int, int], int] = defaultdict(int)
    for rank, steps in enumerate(ranks):
        for step in steps:
            if isinstance(step, Send):
                sent[step.value, rank, step.target] += 1
            elif isinstance(step, Receive):
                sent[step.value, step.source, rank] -= 1
    for (value, source, target), count in sent.items():
        if count:
            what = "is sent and not received" if count > 0 else "is received and not sent"
            raise ProgramError(f"{value}, rank {source} to {target}: {what}")


class _Streams:
    """Ranks whose hosts queue messages on one stream each."""

    def __init__(self, ranks: Sequence[Sequence[Step]]) -> None:
        self.ranks = ranks
        self.host = [0] * len(ranks)
        self.queues: list[list[Receive | Send]] = [[] for _ in ranks]
        self.complete: set[Value] = set()

    def advance(self) -> bool:
        """Moves hosts and messages as far as possible. Returns whether anything moved."""
        moved = False
        for rank, steps in enumerate(self.ranks):
            while self.host[rank] < len(steps) and self._passes(rank, steps[self.host[rank]]):
                self.host[rank] += 1
                moved = True
        for rank, queue in enumerate(self.queues):
            while queue and self._completes(rank, queue[0]):
                moved = True
        return moved

    def _passes(self, rank: int, step: Step) -> bool:
        """Whether the host gets past a step. An action waits for the receives that it needs, and so for all older ones,
        since they share a stream."""
        match step:
            case Wait(value):
                return value in self.complete
            case Act(action):
                return all(self._arrived(rank, value) for value in _inputs(action))
            case _:
                self.queues[rank].append(step)
                return True

    def _arrived(self, rank: int, value: Value) -> bool:
        return value in self.complete or not any(
            isinstance(step, Receive) and step.value == value for step in self.ranks[rank]
        )

    def _completes(self, rank: int, message: Receive | Send) -> bool:
        """Completes a message if both of its ends are next on their streams."""
        other = message.target if isinstance(message, Send) else message.source
        queue = self.queues[other]
        if (
            not queue
            or queue[0].value != message.value
            or isinstance(queue[0], Send) == isinstance(message, Send)
        ):
            return False
        self.queues[rank].pop(0)
        queue.pop(0)
        self.complete.add(message.value)
        return True

    @property
    def stuck(self) -> list[str]:
        """Where each rank is blocked."""
        result = []
        for rank, (steps, queue) in enumerate(zip(self.ranks, self.queues, strict=True)):
            left = steps[self.host[rank] :]
            if left or queue:
                at = _words(left[0]) if left else "the end"
                message = f"; next message: {_words(queue[0])}" if queue else ""
                result.append(f"rank {rank} waits at {at}{message}")
        return result


def _inputs(action: Action) -> list[Value]:
    """The values that an action may need, received or not."""
    kind, chunk, k = action
    match kind:
        case "F":
            return [Value("activation", chunk, k)]
        case "B" | "I":
            return [Value("gradient", chunk, k)]
    return []


def _words(step: Step) -> str:
    match step:
        case Receive(value, source):
            return f"receive of {value} from rank {source}"
        case Send(value, target):
            return f"send of {value} to rank {target}"
        case Wait(value):
            return f"wait for {value}"
        case Act(action):
            return str(action)
