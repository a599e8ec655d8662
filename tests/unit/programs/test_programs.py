"""Programs of the pipe axis: the schedules, and the check that finds faults in a program."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megalite.programs.check import ProgramError, check, most_bytes
from megalite.programs.program import Action, Program
from megalite.programs.schedules import SCHEDULES, make_program
from tests.schedules import SIZES, programs, uneven


@pytest.mark.parametrize("p, m", SIZES)
def test_programs_are_complete_and_ordered(p: int, m: int) -> None:
    for _, _, program in programs(p, m):
        check(program)


@pytest.mark.parametrize("p, m", [(p, m) for p in (2, 3, 4, 8) for m in (p, 2 * p, 8 * p)])
def test_bubbles_are_those_of_the_formulas(p: int, m: int) -> None:
    """With T_F = T_I = T_W; ZB-V's bubble is the least that a V shape can have."""
    units = {"1f1b": 1, "zb-h1": 3, "zb-v": 6}
    for schedule, v, program in programs(p, m):
        expected = (p - 1) / (units.get(schedule, v) * m + p - 1)
        assert SCHEDULES[schedule].bubble(p, m, v)[1] == pytest.approx(expected)
        assert check(program).bubble == pytest.approx(expected, abs=1e-9), schedule


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


@pytest.mark.parametrize("p, m", SIZES)
def test_a_rank_holds_at_least_what_its_schedule_says(p: int, m: int) -> None:
    """For the planner's bounds: on any cut, so of the chunk that it holds the fewest micro-batches of."""
    for schedule, _, program in programs(p, m):
        for rank, least in enumerate(SCHEDULES[schedule].least_held(p, m)):
            most = dict.fromkeys(program.chunks_of(rank), 0)
            held = dict(most)
            for kind, chunk, _ in program.actions[rank]:
                held[chunk] += {"F": 1, "B": -1, "I": 0, "W": -1}[kind]
                most[chunk] = max(most[chunk], held[chunk])
            assert least <= min(most.values()), (schedule, rank)


def test_uneven_costs_do_not_stop_the_list_scheduler() -> None:
    for p, m in ((2, 5), (4, 9), (8, 16)):
        check(make_program("zb-v", p, m, 2, uneven), uneven)


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
