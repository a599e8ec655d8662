"""Experts: the same training on every layout with and without an expert axis, and faults that must be found.

The bounds are those of tools/verify_layouts.py, and clipping acts in every step.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
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
from megalite.engine.router_bias import expert_counts
from megalite.guard.replicas import Replicas
from megalite.model.context import Context
from megalite.model.families import model_dict
from megalite.model.router import Router
from megalite.parallel.grid import ALONE
from megalite.parallel.layers import placed
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.mutants import mutants
from megalite.prove.trace import Session, Trace, record
from megalite.prove.verify import Spread
from megalite.training.batches import MicroBatch
from megalite.training.expert_load import ExpertLoad
from megalite.training.start import starting_point
from megalite.training.step import samples_that_count
from tests.ranks import run_ranks
from tests.traces import Request, document, marked_corpus, nothing, traces

STEPS, BATCH = 4, 8
# Between the probabilities of the last chosen expert and the next one: more than rounding.
GAP = 1e-6
Case = tuple[str, Layout]
MIXTRAL, QWEN = "mixtral", "qwen3_moe"  # untied; tied, and a layer without experts
SHARED = "qwen2_moe"  # a weighted shared expert in every other layer
ERNIE = "ernie4_5_moe"  # unweighted, in all layers except the first
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
    (QWEN, Layout(data=2, context=2, expert=2, zero=2, micro=2)),
    (QWEN, Layout(pipe=2, data=2, expert=2, zero=2, micro=1, schedule="zb-v")),
    (QWEN, Layout(pipe=2, data=2, expert=2, zero=1, micro=2)),
    (SHARED, Layout(data=2, zero=3, micro=2)),
    (SHARED, Layout(tensor=2, zero=1, micro=4, sequence=True)),
    (SHARED, Layout(tensor=2, data=2, expert=2, zero=0, micro=1)),
    (SHARED, Layout(pipe=2, data=2, expert=2, zero=2, micro=1, schedule="zb-v")),
    (ERNIE, Layout(tensor=2, data=2, expert=2, zero=2, micro=2)),
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
    (SHARED, Layout(tensor=2, data=2, expert=1, zero=2, micro=2)),
    (SHARED, Layout(pipe=2, tensor=2, zero=1, micro=2, schedule="zb-h1")),
    *((SHARED, Layout(pipe=2, tensor=2, data=2, expert=2, zero=zero)) for zero in (0, 1, 2)),
    (SHARED, Layout(pipe=2, tensor=2, data=2, zero=2, micro=1, schedule="zb-v")),
]


def name(case: Case) -> str:
    return f"{case[0]} {case[1]}"


class Runs:
    """Records the cases that tests need, all cases of a world size at once."""

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
    """No token's choice depends on rounding: layouts could rightly differ there."""
    whole = Router.choose

    def watched(self: Router, probabilities: Tensor) -> Tensor:
        ranked, k = probabilities.sort(descending=True).values, self.mixture.chosen
        assert (ranked[:, k - 1] - ranked[:, k]).min() > GAP
        return whole(self, probabilities)

    with mock.patch.object(Router, "choose", watched):
        yield


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in OTHERS)], ids=name
)
def test_layout_equals_one_process(runs: Runs, case: Case) -> None:
    spread, trace = runs.spread(case[0]), runs.trace(case)
    assert max(row["norm"] for row in spread.reference.figures[0]) > 0.5, "clipping must act"
    verdict = spread.judge(trace)
    assert not verdict.first, "; ".join(map(str, verdict.first))


FAULTY = Layout(data=2, expert=2, zero=1, micro=2)
FAULTS = {
    "experts: left out of the norm",
    "experts: a token's last choice is silently dropped",
    "experts: the last rank resolves near ties differently",
    "experts: gradients are divided by the copies of an expert",
    "experts: rows come back in the order of their arrival",
    "experts: the balance loss is computed over a micro-batch",
}


def faulty(rank: int, world_size: int, requests: list[tuple[dict[str, Any], str, Path]]) -> None:
    deepspeed.init_distributed("gloo")
    for json, fault, folder in requests:
        config = Config.from_dict(json)
        record(config, 2, folder, mutants(config)[fault])


def test_planted_faults_are_found(runs: Runs) -> None:
    config = runs.config(MIXTRAL, FAULTY)
    assert {name for name in mutants(config) if name.startswith("experts: ")} == FAULTS
    requests = [
        (config.to_json(), fault, runs.folder / f"fault {number}")
        for number, fault in enumerate(sorted(FAULTS))
    ]
    shared = runs.config(SHARED, Layout(tensor=2, zero=1, micro=2))
    (fault,) = [name for name in mutants(shared) if name.startswith("experts: the shared")]
    requests.append((shared.to_json(), fault, runs.folder / "fault of the shared expert"))
    for _, _, folder in requests:
        folder.mkdir()
    run_ranks(2, faulty, requests, timeout_seconds=240)
    for json, fault, folder in requests:
        family = json["megalite"]["model"]["model_type"]
        first = runs.spread(family).judge(Trace(folder)).first
        assert first and first[0].step == 1, fault


def saved_in_turn(rank: int, world_size: int, configs: list[dict[str, Any]], base: Path) -> None:
    """Trains two steps on the first layout; each of the others loads what the previous one has saved, and saves it."""
    deepspeed.init_distributed("gloo")
    for number, config in enumerate(map(Config.from_dict, configs)):
        session = Session.build(config)
        if number == 0:
            session.step(0), session.step(1)
        else:
            starting_point(base / str(number - 1), None).fill(session.engine)
        saver, stage = Saver(base / str(number), keep=0), config.zero_stage
        boxes = owned_boxes(session.engine.shards(), session.engine.grid, replicated=stage == 0)
        state = {**asdict(session.position(2)), "seed": 1, "model": model_dict(config.model)}
        saver.save(2, boxes, state)
        saver.wait()


PASSED_ON = [
    Layout(data=4, zero=2, micro=1),
    Layout(data=4, expert=2, zero=1, micro=1),
    Layout(tensor=2, data=2, expert=2, zero=2, micro=1),
    Layout(pipe=2, data=2, zero=1, micro=1),
    Layout(data=4, expert=4, zero=0, micro=1),
]


@pytest.mark.parametrize(("family", "layouts"), [(QWEN, PASSED_ON), (SHARED, PASSED_ON[:3])])
def test_a_checkpoint_passes_between_expert_axes_bit_for_bit(
    runs: Runs, tmp_path: Path, family: str, layouts: list[Layout]
) -> None:
    configs = [runs.config(family, layout).to_json() for layout in layouts]
    run_ranks(4, saved_in_turn, configs, tmp_path, timeout_seconds=240)
    first, *others = (
        Checkpoint.open(find_checkpoint(tmp_path / str(number))) for number in range(len(layouts))
    )
    assert len(first.names) > 20 and first.moments == {"exp_avg", "exp_avg_sq"}
    for other in others:
        assert sorted(other.names) == sorted(first.names)
        for tensor in first.names:
            for kind in (WEIGHT, *first.moments):
                wanted = first.read(tensor, kind=kind)
                assert torch.equal(other.read(tensor, kind=kind), wanted), (kind, tensor)


def loads(rank: int, world_size: int, config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    deepspeed.init_distributed("gloo")
    session = Session.build(Config.from_dict(config))
    lines: list[str] = []
    load = ExpertLoad(session.engine, 2, lines.append)
    for router in session.engine.stage.routers.values():
        router.bias[:3] = 10.0  # so that the second rank of the expert axis gets no row
    session.step(0)
    first: dict[str, Any] = {"step": 1}
    second: dict[str, Any] = {"step": 2}
    load.after_step(first)
    load.after_step(second)
    assert first == {"step": 1}
    return second, lines


def test_the_load_of_experts_is_counted_over_all_ranks(runs: Runs) -> None:
    layout = Layout(tensor=2, data=2, expert=2, zero=1, micro=2)
    reports = run_ranks(4, loads, runs.config(QWEN, layout).to_json())
    fields, lines = reports[0]
    assert all(report == reports[0] for report in reports)
    tokens = fields["expert_tokens"]
    assert list(tokens) == ["0", "2", "3"]  # layer 1 has no experts
    assert all(row == [BATCH * 12] * 3 + [0] * 5 for row in tokens.values())
    assert fields["expert_imbalance"] == 8 / 3
    dead = "; ".join(f"layer {layer}: 3, 4, 5, 6, 7" for layer in tokens)
    assert lines == [f"step 2: experts without tokens: {dead}"]


def biases(rank: int, world_size: int, configs: list[dict[str, Any]], base: Path) -> list[Any]:
    """After three steps, and after a resume from there."""
    deepspeed.init_distributed("gloo")
    result = []
    for number, config in enumerate(map(Config.from_dict, configs)):
        session = Session.build(config)
        engine, wanted = session.engine, torch.zeros(3, 8)
        for step in range(3):
            session.step(step)
            counts = expert_counts(engine.stage, engine.grid, torch.device("cpu")).float()
            wanted += 2**-8 * (counts.mean(1, keepdim=True) - counts).sign()
        assert engine.router_bias is not None and wanted.any()
        assert torch.equal(engine.router_bias.values, wanted)
        resumed = session.resumed(3, base / f"{world_size} {number}")
        for engine in (session.engine, resumed.engine):
            assert engine.router_bias is not None
            for layer, router in engine.stage.routers.items():
                row = router.mixture.layers.index(layer)
                assert torch.equal(router.bias, engine.router_bias.values[row])
            result.append(engine.router_bias.state)
        if session.engine.grid.expert_replica.size > 1 and session.engine.grid.expert.size > 1:
            check_replicas(session, rank)
    return result


def check_replicas(session: Session, rank: int) -> None:
    """A diverged copy of an expert is found among that expert's copies."""
    replicas, cpu = Replicas(session.engine.stage), torch.device("cpu")
    assert replicas.difference(cpu) is None
    name = "layers.0.mlp.experts.gate.weight"
    values = {place.name: value for value, place in placed(session.engine.stage)}
    if rank == 3:
        values[name].data[0, 0, 0] += 1.0
    found = replicas.difference(cpu)
    assert found is not None and (found.name, found.ranks) == (name, (1, 3))


def test_the_bias_is_the_same_on_every_layout_and_after_a_resume(
    runs: Runs, tmp_path: Path
) -> None:
    found = []
    for layouts in (
        [Layout(zero=0, micro=4), Layout(zero=1, micro=1)],
        [
            Layout(data=4, expert=2, zero=1, micro=1),
            Layout(pipe=2, data=2, expert=2, zero=2, micro=2),
            Layout(tensor=2, data=2, zero=0, micro=2),
        ],
    ):
        configs = []
        for layout in layouts:
            config = runs.config(QWEN, layout).to_json()
            config["megalite"]["train"]["router"] = {"balance": "bias", "bias_rate": 2**-8}
            configs.append(config)
        for of_rank in run_ranks(layouts[0].world_size, biases, configs, tmp_path):
            found += of_rank
    assert all(state == found[0] for state in found)


def test_samples_without_a_label_are_not_balanced() -> None:
    labels = torch.tensor([[1, -100], [-100, -100], [3, 4]])
    batches = [MicroBatch(labels, labels, Context()), MicroBatch(labels, labels + 200, Context())]
    each = samples_that_count(batches, ALONE)
    assert each.tolist() == [[1, 0, 1], [1, 1, 1]]
