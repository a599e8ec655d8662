"""The steps of a program: an order of its messages that cannot hang, and few values kept after they were sent."""

import pytest

from megalite.pipeline.steps import (
    IN_FLIGHT,
    Act,
    Receive,
    Send,
    Step,
    Wait,
    _Streams,
    check_steps,
    forward_stream,
    steps_of,
)
from megalite.programs.check import ProgramError, check
from megalite.programs.program import Action, Value
from megalite.programs.schedules import forward_only, make_program, round_robin, straight, v_shaped
from tests.schedules import SIZES, programs, uneven


@pytest.mark.parametrize("p, m", SIZES)
def test_steps_cannot_hang(p: int, m: int) -> None:
    for _, _, program in programs(p, m):
        check_steps(steps_of(program))


def test_steps_of_a_program_for_uneven_costs_cannot_hang() -> None:
    for p, m in ((2, 5), (4, 9), (8, 16)):
        check_steps(steps_of(make_program("zb-v", p, m, 2, uneven), uneven))


def test_a_crossing_order_of_messages_is_named() -> None:
    """Each rank sends first: by NCCL's rules both sends wait for receives that come after them."""
    there, back = Value("activation", 1, 0), Value("gradient", 0, 0)
    steps: list[list[Step]] = [
        [Send(there, 1), Receive(back, 1)],
        [Send(back, 0), Receive(there, 0)],
    ]
    with pytest.raises(
        ProgramError, match="rank 0 waits at the end; next message: send of activation of chunk 1"
    ):
        check_steps(steps)


def test_a_message_without_its_other_end_is_named() -> None:
    steps = steps_of(make_program("1f1b", 2, 3, 1))
    lost = next(step for step in steps[1] if isinstance(step, Send))
    with pytest.raises(
        ProgramError,
        match="gradient of chunk 0, micro-batch 0, rank 1 to 0: is received and not sent",
    ):
        check_steps([steps[0], [step for step in steps[1] if step != lost]])


def test_receives_are_posted_before_the_work_that_does_not_need_them() -> None:
    """In 1F1B's steady state a rank has posted the receive of the next activation when it starts a backward."""
    steps = steps_of(make_program("1f1b", 2, 8, 1))[1]
    for k in range(7):
        posted = steps.index(Receive(Value("activation", 1, k + 1), 0))
        assert posted < steps.index(Act(Action("B", 1, k)))


@pytest.mark.parametrize("home", [straight(4), round_robin(3, 2), v_shaped(4)], ids=str)
def test_forward_only_programs_hold_few_messages(home: tuple[int, ...]) -> None:
    program = forward_only(home, 9)
    steps = steps_of(program)
    check(program)
    check_steps(steps)
    for own in steps:
        under_way = most = 0
        for step in own:
            under_way += isinstance(step, Send) - isinstance(step, Wait)
            most = max(most, under_way)
        assert most <= IN_FLIGHT


@pytest.mark.parametrize("p, m", [(2, 2), (2, 8), (3, 6), (4, 12), (8, 16)])
def test_a_send_is_waited_for_when_it_has_arrived(p: int, m: int) -> None:
    """No host stops at such a wait, by NCCL's rules, and what a rank keeps does not grow with the micro-batches."""
    for schedule, v, program in programs(p, m):
        player = _Streams(steps_of(program))
        while player.advance():
            for rank, number in enumerate(player.host):
                assert not isinstance(next(iter(player.ranks[rank][number:]), None), Wait)
        assert not player.stuck
        if m >= 2 * p:
            longer = make_program(schedule, p, 2 * m, v)
            assert kept_at_most(steps_of(program)) == kept_at_most(steps_of(longer))


def test_few_values_are_kept_after_they_were_sent() -> None:
    """The figures of docs/gpus.md, for 32 micro-batches on 4 stages; without the waits a rank would keep all."""
    kept = {(name, v): max(kept_at_most(steps_of(program))) for name, v, program in programs(4, 32)}
    assert kept["1f1b", 1] == 4 and kept["interleaved", 2] == 11


def kept_at_most(ranks: list[list[Step]]) -> list[int]:
    """The most values that each rank has sent and not waited for at a time, before its last wait."""
    result = []
    for steps in ranks:
        under_way = most = 0
        last = max((n for n, step in enumerate(steps) if isinstance(step, Wait)), default=0)
        for step in steps[:last]:
            under_way += isinstance(step, Send) - isinstance(step, Wait)
            most = max(most, under_way)
        result.append(most)
    return result


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_stream_of_forwards_has_the_steps_of_a_program(p: int) -> None:
    ranks = [list(forward_stream(p, rank, range(5))) for rank in range(p)]
    check_steps(ranks)
    like = steps_of(forward_only(straight(p), 5))
    for one, other in zip(ranks, like, strict=True):
        assert [step for step in one if isinstance(step, Act)] == [
            step for step in other if isinstance(step, Act)
        ]
        assert {*one} == {*other}


def test_a_stream_asks_for_a_pass_when_its_turn_comes() -> None:
    done: list[int] = []

    def numbers():  # noqa: ANN202
        for number in range(3):
            assert len(done) == number
            yield number

    for step in forward_stream(2, 0, numbers(), ahead=0):
        if isinstance(step, Act):
            done.append(step.action.micro_batch)
