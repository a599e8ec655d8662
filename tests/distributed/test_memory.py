"""What a layout holds and sends: gradient bytes by storage under ZeRO, and bytes by axis."""

from typing import Any

import pytest

from megalite.parallel.layers import placed
from megalite.parallel.traffic import Traffic
from tests.ranks import run_ranks
from tests.small_models import SEQUENCE, Layout, Task, build

FP32_BYTES = 4
TASK = Task("llama", tied=False)
MICRO_BATCHES = 4


def one_step(rank: int, world_size: int, layout: Layout) -> dict[str, Any]:
    """Gradient bytes after each backward, bytes sent by axis in a step, this rank's weights and the largest one."""
    engine, pipeline, grid = build(layout, TASK)
    tokens, labels = TASK.samples(0)
    batches = [(tokens[: layout.micro], labels[: layout.micro])] * MICRO_BATCHES
    held: list[int] = []
    step = engine.step

    def watched() -> None:
        held.append(engine.state_bytes()["gradients_bytes"])
        step()

    engine.step = watched  # type: ignore[method-assign]
    with Traffic(grid) as traffic:
        pipeline.train_step(batches, 1.0)
    sizes = [value.numel() for value, _ in placed(engine.stage)]
    return {"held": held, "sent": traffic.bytes, "weights": sum(sizes), "largest": max(sizes)}


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Any]]]:
    return {stage: run_ranks(4, one_step, Layout(pipe=2, data=2, stage=stage)) for stage in (1, 2)}


def test_zero_2_holds_half_of_the_gradients_through_the_pipe(measured: dict[int, list[dict[str, Any]]]) -> None:
    """Between micro-batches: 1/d in fp32. The tensor that straddles two owners is kept whole by its view."""
    for row in measured[2]:
        half = FP32_BYTES * row["weights"] / 2
        assert max(row["held"]) <= half + 2 * FP32_BYTES * row["largest"]
    for row in measured[1]:
        assert max(row["held"]) >= FP32_BYTES * row["weights"]  # what ZeRO-2 saves


def test_zero_1_sends_half_of_an_all_reduce(measured: dict[int, list[dict[str, Any]]]) -> None:
    """formulas.md's counts: ZeRO-1 e_g + e_p at the boundary, ZeRO-2 m·e_g + e_p, in units of (d-1)/d·weights; the
    pipe carries a micro-batch's hidden states (or their gradients) across its one boundary."""
    for stage, reductions in ((1, 1), (2, MICRO_BATCHES)):
        for row in measured[stage]:
            assert row["sent"]["data"] == (reductions + 1) * FP32_BYTES * row["weights"] // 2
            assert row["sent"]["pipe"] == MICRO_BATCHES * 2 * SEQUENCE * 32 * FP32_BYTES
