"""Experts: the same training on every layout with and without an expert axis, and faults that must be found.

The bounds are those of tools/verify_layouts.py, and clipping acts in every step.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from torch import Tensor

from megalite.checkpoint.files import WEIGHT, Checkpoint, find_checkpoint
from megalite.checkpoint.save import Saver, owned_boxes
from megalite.config import Config
from megalite.data.position import Position
from megalite.engine.norm import GlobalNorm
from megalite.model import experts, router
from megalite.model.families import model_dict
from megalite.parallel import exchange
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Session, Trace
from megalite.prove.verify import Spread
from megalite.training import step as training_step
from megalite.training.expert_load import ExpertLoad
from megalite.training.start import starting_point
from tests.ranks import run_ranks
from tests.traces import Request, document, marked_corpus, nothing, traces

STEPS, BATCH = 4, 8
GAP = 1e-6  # between the probabilities of the last expert that is chosen and the next: more than rounding
Case = tuple[str, Layout]
MIXTRAL, QWEN = "mixtral", "qwen3_moe"  # untied; tied, and a layer without experts
CASES: list[Case] = [
    (MIXTRAL, Layout(data=2, zero=3, micro=2)),
    (MIXTRAL, Layout(pipe=2, zero=1, micro=2, schedule="zb-h1")),
    (MIXTRAL, Layout(data=2, expert=2, zero=0, micro=4)),
    (MIXTRAL, Layout(data=2, expert=2, zero=2, micro=1)),
    (QWEN, Layout(data=2, expert=2, zero=1, micro=2)),
    (QWEN, Layout(tensor=2, zero=1, micro=4, sequence=True)),
    (MIXTRAL, Layout(data=4, expert=2, zero=0, micro=1)),
    (MIXTRAL, Layout(data=4, expert=2, zero=1, micro=2)),
    (MIXTRAL, Layout(data=4, expert=4, zero=2, micro=1)),
    (MIXTRAL, Layout(tensor=2, data=2, expert=2, zero=2, micro=2)),
    (QWEN, Layout(pipe=2, data=2, expert=2, zero=2, micro=1, schedule="zb-v")),
    (QWEN, Layout(pipe=2, data=2, expert=2, zero=1, micro=2)),
]
OTHERS: list[Case] = [
    (MIXTRAL, Layout(pipe=2, zero=2, micro=4)),
    (QWEN, Layout(pipe=2, zero=0, micro=1, schedule="interleaved")),
    (QWEN, Layout(data=2, zero=3, micro=1)),
    (QWEN, Layout(data=2, expert=2, zero=0, micro=1)),
    (QWEN, Layout(data=4, expert=4, zero=1, micro=2)),
    (QWEN, Layout(data=4, expert=2, zero=2, micro=1)),
    (QWEN, Layout(tensor=2, data=2, expert=2, zero=1, micro=2, sequence=True)),
    (MIXTRAL, Layout(pipe=2, data=2, expert=2, zero=0, micro=2, schedule="zb-h1")),
    (MIXTRAL, Layout(pipe=2, data=2, expert=2, zero=1, micro=1, schedule="interleaved")),
    (QWEN, Layout(tensor=4, zero=1, micro=2)),
    (MIXTRAL, Layout(pipe=2, tensor=2, data=2, expert=2, zero=2, micro=2)),
    (QWEN, Layout(pipe=2, tensor=2, data=2, expert=2, zero=1, micro=1, schedule="zb-v")),
    (MIXTRAL, Layout(pipe=2, data=4, expert=2, zero=2, micro=1, schedule="zb-v")),
]


def name(case: Case) -> str:
    return f"{case[0]} {case[1]}"


class Runs:
    """Records what a test asks for, each world once with all its cases."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, marked_corpus(folder / "corpus")
        self.recorded: dict[str, Trace] = {}

    def config(self, family: str, layout: Layout) -> Config:
        json = document(self.corpus, family, family == QWEN, BATCH)
        json["megalite"]["train"]["router"] = {"z_loss": 0.01}
        return config_of(Config.from_dict(json), layout, BATCH)

    def request(self, case: Case, fault: Any = nothing, label: str = "") -> Request:
        return self.config(*case).to_json(), fault, self.folder / (label or name(case))

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self, family: str) -> Spread:
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        requests = [self.request((family, layout), gap_is_wide) for layout in layouts]
        reference, *others = traces(1, STEPS, requests)
        return Spread(reference, others)

    def trace(self, case: Case) -> Trace:
        if name(case) not in self.recorded:
            together = CASES if case in CASES else OTHERS
            cases = [other for other in together if other[1].world_size == case[1].world_size]
            found = traces(case[1].world_size, STEPS, [self.request(other) for other in cases])
            self.recorded |= dict(zip(map(name, cases), found, strict=True))
        return self.recorded[name(case)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("experts"))


@contextlib.contextmanager
def gap_is_wide(rank: int) -> Iterator[None]:
    """No token's choice hangs on rounding: else layouts may rightly differ."""
    whole = router.Router.forward

    def watched(self: router.Router, rows: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        probabilities = (rows @ self.weight.t()).softmax(-1).sort(descending=True).values
        k = self.mixture.chosen
        assert (probabilities[:, k - 1] - probabilities[:, k]).min() > GAP
        return whole(self, rows, context)

    with mock.patch.object(router.Router, "forward", watched):
        yield


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)], ids=name
)
def test_layout_equals_one_process(runs: Runs, case: Case) -> None:
    spread, trace = runs.spread(case[0]), runs.trace(case)
    assert max(row["norm"] for row in spread.reference.figures[0]) > 0.5, "clipping must act"
    verdict = spread.judge(trace)
    assert not verdict.first, "; ".join(map(str, verdict.first))
