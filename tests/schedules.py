"""Programs of every pipeline schedule, for tests."""

from megalite.programs.program import Program
from megalite.programs.schedules import SCHEDULES, make_program

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, p, 2 * p + 1, 4 * p)]


def programs(p: int, m: int) -> list[tuple[str, int, Program]]:
    """Every schedule that accepts m micro-batches on p ranks, with its chunks per rank."""
    return [
        (name, v, make_program(name, p, m, v))
        for name, schedule in SCHEDULES.items()
        for v in ((2, 3) if schedule.chunks is None else (schedule.chunks,))
        if m % p == 0 or not schedule.whole_groups
    ]


def uneven(kind: str, chunk: int) -> float:
    return {"F": 1.0, "I": 0.4, "W": 2.5, "B": 2.9}[kind] * (1 + chunk % 3)
