"""Programs of the pipe axis: the schedules, the check, and the cut."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from megalite.model.chunks import layers_of
from megalite.pipeline.check import ProgramError, check, most_bytes
from megalite.pipeline.cut import LayerCosts, ModelCosts, cut_by_cost, even_counts
from megalite.pipeline.program import Action, Program, Value
from megalite.pipeline.schedules import (
    SCHEDULES,
    forward_only,
    home_of,
    make_program,
    round_robin,
    straight,
    v_shaped,
)
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

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, p, 2 * p + 1, 4 * p)]


def programs(p: int, m: int) -> list[tuple[str, int, Program]]:
    kinds = [
        (schedule, v)
        for schedule in SCHEDULES
        for v in ((2, 3) if schedule == "interleaved" else (2,))
    ]
    kinds = [(schedule, v) for schedule, v in kinds if schedule != "interleaved" or m % p == 0]
    return [(schedule, v, make_program(schedule, p, m, v)) for schedule, v in kinds]


@pytest.mark.parametrize("p, m", SIZES)
def test_programs_are_complete_ordered_and_cannot_hang(p: int, m: int) -> None:
    for _, _, program in programs(p, m):
        check(program)
        check_steps(steps_of(program))


@pytest.mark.parametrize("p, m", [(p, m) for p in (2, 3, 4, 8) for m in (p, 2 * p, 8 * p)])
def test_bubbles_are_those_of_the_formulas(p: int, m: int) -> None:
    """With T_F = T_I = T_W; ZB-V's bubble is the least that a V shape can have."""
    formulas = {
        ("1f1b", 2): (p - 1) / (m + p - 1),
        ("interleaved", 2): (p - 1) / (2 * m + p - 1),
        ("interleaved", 3): (p - 1) / (3 * m + p - 1),
        ("zb-h1", 2): (p - 1) / (3 * m + p - 1),
        ("zb-v", 2): (p - 1) / (6 * m + p - 1),
    }
    for schedule, v, program in programs(p, m):
        assert check(program).bubble == pytest.approx(formulas[schedule, v], abs=1e-9), schedule


@pytest.mark.parametrize("p, m", SIZES)
def test_the_number_of_held_micro_batches(p: int, m: int) -> None:
    for schedule, v, program in programs(p, m):
        report = check(program)
        for rank in range(p):
            kept = most_bytes(program, rank, lambda chunk: 1, lambda chunk: 1).bytes
            if schedule == "1f1b":
                assert report.held[rank] == min(p - rank, m) and report.waiting[rank] == 0
            elif schedule == "interleaved" and m >= 2 * p:
                assert report.held[rank] == p * v + p - 1 - 2 * rank
            elif schedule == "zb-h1":
                assert report.held[rank] == min(p - rank, m) and kept <= min(p, m) + 1
            elif schedule == "zb-v":
                assert kept <= 2 * p


def test_uneven_costs_do_not_stop_the_list_scheduler() -> None:
    def cost(kind: str, chunk: int) -> float:
        return {"F": 1.0, "I": 0.4, "W": 2.5, "B": 2.9}[kind] * (1 + chunk % 3)

    for p, m in ((2, 5), (4, 9), (8, 16)):
        program = make_program("zb-v", p, m, 2, cost)
        check(program, cost)
        check_steps(steps_of(program, cost))


def edited(program: Program, rank: int, edit: Callable[[list[Action]], None]) -> Program:
    actions = list(program.actions[rank])
    edit(actions)
    return replace(
        program, actions=(*program.actions[:rank], tuple(actions), *program.actions[rank + 1 :])
    )


def missing(actions: list[Action]) -> None:
    actions.remove(Action("B", 1, 2))


def doubled(actions: list[Action]) -> None:
    actions.append(Action("B", 1, 2))


def misplaced(actions: list[Action]) -> None:
    actions.append(Action("F", 0, 1))


def beyond(actions: list[Action]) -> None:
    actions.append(Action("F", 1, 4))


def reordered(actions: list[Action]) -> None:
    one, two = actions.index(Action("B", 1, 0)), actions.index(Action("B", 1, 1))
    actions[one], actions[two] = actions[two], actions[one]


def before_its_forward(actions: list[Action]) -> None:
    actions.remove(Action("B", 1, 0))
    actions.insert(0, Action("B", 1, 0))


@pytest.mark.parametrize(
    "fault, text",
    [
        (missing, "rank 1: chunk 1, micro-batch 2: has F"),
        (doubled, "rank 1: B1.2 occurs twice"),
        (misplaced, "rank 1: F0.1: chunk 0 is on rank 0"),
        (beyond, "rank 1: chunk 1: has no micro-batch 4: a step has 4"),
        (reordered, "rank 1: chunk 1: sums weight gradients in the order [1, 0, 2, 3]"),
        (before_its_forward, "rank 0 waits at B0.0; rank 1 waits at B1.0"),
    ],
)
def test_faults_in_a_program_are_named(fault: Callable[[list[Action]], None], text: str) -> None:
    with pytest.raises(ProgramError) as found:
        check(edited(make_program("1f1b", 2, 4, 1), 1, fault))
    assert text in str(found.value)


def test_weight_gradients_before_their_backward_are_named() -> None:
    def early(actions: list[Action]) -> None:
        actions.remove(Action("W", 1, 0))
        actions.insert(actions.index(Action("I", 1, 0)), Action("W", 1, 0))

    with pytest.raises(ProgramError, match="rank 1 waits at W1.0"):
        check(edited(make_program("zb-h1", 2, 4, 1), 1, early))


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
    assert kept["1f1b", 2] == 4 and kept["interleaved", 2] == 11


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


def cuts(layers: int, chunks: int) -> list[list[int]]:
    """Every cut in which only the last chunk may have no layer."""
    ways = product(range(1, layers + 1), repeat=chunks - 1)
    return [[*first, layers - sum(first)] for first in ways if sum(first) <= layers]


@pytest.mark.parametrize("schedule, p, layers", [
    ("1f1b", 2, 9), ("1f1b", 4, 9), ("zb-h1", 3, 10), ("interleaved", 2, 8), ("interleaved", 3, 7), ("zb-v", 2, 8),
])  # fmt: skip
@pytest.mark.parametrize("head, recomputes", [(0.0, False), (2.2, False), (8.0, True)])
def test_no_cut_has_a_shorter_step(
    schedule: str, p: int, layers: int, head: float, recomputes: bool
) -> None:
    costs = ModelCosts(tuple(LayerCosts(1.0, 0.1) for _ in range(layers)), head, recomputes)
    home = home_of(schedule, p, 2)

    def length(counts: list[int]) -> float:
        cost = costs.of_chunks(counts)
        return check(make_program(schedule, p, 2 * p, 2, cost), cost).length

    found = cut_by_cost(costs, home, lambda cost: make_program(schedule, p, 2 * p, 2, cost))
    counts = [len(part) for part in found.layers]
    assert sum(counts) == layers and found.layers == layers_of(counts)
    assert length(counts) <= min(map(length, cuts(layers, len(home)))) * 1.01


def test_equal_layers_without_a_head_are_cut_evenly() -> None:
    costs = ModelCosts((LayerCosts(1.0, 0.0),) * 12, head=0.0)
    for p in (2, 3, 4):
        found = cut_by_cost(
            costs, straight(p), lambda cost, p=p: make_program("1f1b", p, 2 * p, 1, cost)
        )
        assert [len(part) for part in found.layers] == even_counts(12, p)


def test_layers_with_windows_weigh_less() -> None:
    """Six layers with short windows and two without: the two take longer than the six."""
    costs = ModelCosts((*(LayerCosts(1.0, 0.1),) * 6, *(LayerCosts(1.0, 3.0),) * 2), head=0.0)
    found = cut_by_cost(costs, straight(2), lambda cost: make_program("1f1b", 2, 4, 1, cost))
    assert [len(part) for part in found.layers] == [6, 2]


def test_interleaving_pays_only_with_the_right_cut() -> None:
    """Llama-3-8B's proportions: 32 layers, and a head that takes as long as 2.2 layers."""
    costs = ModelCosts((LayerCosts(1.0, 0.0),) * 32, head=6.6)

    def length(schedule: str, counts: list[int] | None) -> float:
        home = home_of(schedule, 4, 2)
        counts = counts or [len(part) for part in cut_by_cost(
            costs, home, lambda cost: make_program(schedule, 4, 8, 2, cost)).layers]  # fmt: skip
        cost = costs.of_chunks(counts)
        return check(make_program(schedule, 4, 8, 2, cost), cost).length

    plain = length("1f1b", None)
    assert length("interleaved", even_counts(32, 8)) > 0.95 * plain
    assert length("interleaved", None) < 0.85 * plain
