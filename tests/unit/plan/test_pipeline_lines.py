"""What `--check` prints about the pipeline (megalite/plan/pipeline_lines.py)."""

import re

import pytest

from megalite.model.families import read_spec
from megalite.pipeline.cut import ModelCosts
from megalite.pipeline.pipeline_plan import PipelinePlan, make_plan
from megalite.plan.pipeline_lines import pipeline_lines
from tests.small_models import MODELS

COSTS = ModelCosts.of(read_spec(MODELS["llama"]), 12, False)


def plan(schedule: str, pipe: int, chunks: int = 1) -> PipelinePlan:
    return make_plan(schedule, pipe, chunks, None, COSTS)


def test_one_rank_has_no_pipeline() -> None:
    assert pipeline_lines(plan("1f1b", 1), 4) == []


def test_each_rank_has_its_layers_its_memory_and_its_load() -> None:
    made = plan("1f1b", 2)
    head, *ranks = pipeline_lines(made, 8)
    share = 100 * made.report(8).bubble
    assert head == (
        f"pipeline: schedule 1f1b, bubble {share:.1f} % of a step with 8 micro-batches, simulated"
    )
    first, last = (len(layers) for layers in made.cut.layers)
    assert ranks[0].startswith(f"    pipe 0: layers 0-{first - 1}, 2 micro-batches held; busy ")
    assert re.search(
        rf"pipe 1: layers? .*{first + last - 1} and head, 1 micro-batch held;", ranks[1]
    )
    assert all(re.search(r"busy \d+\.\d %$", line) for line in ranks)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v"])
def test_weight_gradients_that_wait_are_counted(schedule: str) -> None:
    lines = pipeline_lines(plan(schedule, 2, 2 if schedule == "zb-v" else 1), 6)
    waiting = plan(schedule, 2, 2 if schedule == "zb-v" else 1).report(6).waiting
    for rank, count in enumerate(waiting):
        one = "weight gradient waits" if count == 1 else "weight gradients wait"
        assert (f"up to {count} {one}" in lines[1 + rank]) == (count > 0)


def test_every_chunk_of_a_rank_is_listed() -> None:
    lines = pipeline_lines(plan("interleaved", 2, 2), 4)
    assert all(line.count(" held") == 2 for line in lines[1:])
    assert sum(line.count("head") for line in lines[1:]) == 1
