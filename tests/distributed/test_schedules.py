"""Every pipeline schedule, the same training: bitwise equal to 1F1B with untied embeddings, and within verify_layouts'
bounds of one process with tied ones."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.config import Config
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread, differences
from tests.ranks import run_ranks
from tests.traces import Request, document, marked_corpus, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import rows, train

STEPS, BATCH, LAYERS = 4, 8, 8
KINDS = ("weight", "exp_avg", "exp_avg_sq")
FULL = {"train": {"activation_checkpointing": "full"}}
EVERY_2 = {"train": {"activation_checkpointing": 2}}
SELECTIVE = {"train": {"activation_checkpointing": "selective"}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
RAMP = {"train": {"batch_ramp": {"start": 4, "increment": 4, "samples": 8}}}
DROPOUT = {"model": {"attention_dropout": 0.2}, "data": {"reset_attention": True}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
Case = tuple[Layout, bool, dict[str, Any]]
"""A layout with a schedule, whether embeddings are tied, and keys by section."""


def scheduled(
    layout: Layout, schedules: str = "interleaved zb-h1 zb-v", tied: bool = False, **keys: Any
) -> list[Case]:
    return [(replace(layout, schedule=schedule), tied, keys) for schedule in schedules.split()]


# Each schedule with each ZeRO stage, option and axis, and with a tied embedding; more combinations in OTHERS.
CASES: list[Case] = [
    *(case for zero in (0, 1, 2) for case in scheduled(Layout(pipe=2, zero=zero, micro=1))),
    *scheduled(Layout(pipe=2, zero=2, micro=2), "interleaved", tied=True),
    *scheduled(Layout(pipe=2, zero=1, micro=1), "zb-h1 zb-v", **FULL),
    *scheduled(Layout(pipe=2, zero=2, micro=1), "zb-v", **EVERY_2),
    *scheduled(Layout(pipe=2, zero=2, micro=2), "interleaved zb-v", **SELECTIVE),
    *scheduled(Layout(pipe=2, zero=2, micro=1), **OFFLOAD),
    # One micro-batch per step: a chunk's first backward is its last.
    *scheduled(Layout(pipe=2, zero=2, micro=BATCH), "zb-v", tied=True, **OFFLOAD),
    *scheduled(Layout(pipe=2, zero=1, micro=1), "zb-h1", **OFFLOAD),
    *scheduled(Layout(pipe=2, zero=2, micro=1), **DROPOUT),
    *scheduled(Layout(pipe=2, zero=1, micro=2), "zb-h1 zb-v", **RAMP),
    *scheduled(Layout(pipe=2, zero=2, micro=1), "interleaved zb-h1", **BF16),
    *scheduled(Layout(pipe=2, zero=1, micro=1), "zb-v", **BF16),
    *scheduled(Layout(pipe=2, zero=2, micro=1), "zb-h1 zb-v", **FP16),
    (Layout(pipe=2, zero=1, micro=1, schedule="interleaved", chunks=4), False, {}),
    *scheduled(Layout(pipe=4, zero=2, micro=2), "interleaved zb-v"),
    *scheduled(Layout(pipe=4, zero=1, micro=1), "zb-h1 zb-v", tied=True),
    *scheduled(Layout(pipe=2, tensor=2, zero=2, micro=1), "interleaved zb-v"),
    *scheduled(Layout(pipe=2, tensor=2, zero=1, micro=2, sequence=True), "zb-h1"),
    *scheduled(Layout(pipe=2, data=2, zero=2, micro=1), "interleaved zb-h1", tied=True),
    *scheduled(Layout(pipe=2, data=2, zero=1, micro=2), "zb-v"),
    *scheduled(Layout(pipe=2, data=2, zero=2, micro=1), "interleaved zb-v", **OFFLOAD),
    *scheduled(Layout(pipe=2, tensor=2, data=2, zero=2, micro=1), "zb-v"),
]
OTHERS: list[Case] = [
    *scheduled(Layout(pipe=2, zero=2, micro=2), "zb-h1 zb-v", tied=True),
    *scheduled(Layout(pipe=2, zero=1, micro=1), "zb-v", **OFFLOAD),
    *scheduled(Layout(pipe=2, zero=2, micro=1), "zb-v", **BF16),
    *scheduled(Layout(pipe=2, zero=1, micro=1), "zb-h1", **BF16),
    *scheduled(Layout(pipe=4, zero=2, micro=2), "zb-h1"),
    *scheduled(Layout(pipe=4, zero=1, micro=1), "interleaved", tied=True),
    *scheduled(Layout(pipe=2, tensor=2, zero=2, micro=1), "zb-h1"),
    *scheduled(Layout(pipe=2, tensor=2, zero=1, micro=2, sequence=True), "zb-v"),
    *scheduled(Layout(pipe=2, data=2, zero=2, micro=1), "zb-v", tied=True),
    *scheduled(Layout(pipe=2, data=2, zero=1, micro=2), "interleaved zb-h1"),
    *scheduled(Layout(pipe=2, data=2, zero=2, micro=1), "zb-h1", **OFFLOAD),
    *scheduled(Layout(pipe=4, data=2, zero=2, micro=1), "zb-h1", tied=True),
]


def name(case: Case) -> str:
    layout, tied, keys = case
    inner = [f"{part}.{key}" for part, section in keys.items() for key in section]
    return ",".join([str(layout), "tied" if tied else "untied", *inner])


class Runs:
    """Records all cases of a world size when one of them is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, marked_corpus(folder / "corpus")
        self.recorded: dict[str, Trace] = {}

    def request(self, case: Case) -> Request:
        layout, tied, keys = case
        json = copy.deepcopy(document(self.corpus, "llama", tied, BATCH))
        section = json["megalite"]
        section["model"]["num_hidden_layers"] = LAYERS
        json |= {part: keys[part] for part in ("bf16", "fp16") if part in keys}
        json["zero_optimization"] |= keys.get("zero", {})
        for part in ("model", "data", "train"):
            section[part] |= keys.get(part, {})
        return (
            config_of(Config.from_dict(json), layout, BATCH).to_json(),
            nothing,
            self.folder / name(case),
        )

    def trace(self, case: Case) -> Trace:
        if name(case) not in self.recorded:
            world_size = case[0].world_size
            listed = CASES if case in CASES or case in map(like_1f1b, CASES) else OTHERS
            every = [*listed, *(like_1f1b(one) for one in listed if not one[1])]
            missing = {name(one): one for one in every if one[0].world_size == world_size}
            missing = {key: one for key, one in missing.items() if key not in self.recorded}
            found = traces(world_size, STEPS, [self.request(one) for one in missing.values()])
            self.recorded |= dict(zip(missing, found, strict=True))
        return self.recorded[name(case)]

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self) -> Spread:
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        reference, *others = traces(
            1, STEPS, [self.request((layout, True, {})) for layout in layouts]
        )
        return Spread(reference, others)


def like_1f1b(case: Case) -> Case:
    layout, tied, keys = case
    return replace(layout, schedule="1f1b", chunks=None), tied, keys


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("schedules"))


def chosen(tied: bool) -> list[Any]:
    """The cases with or without tied embeddings, the others for the long form."""
    others = [pytest.param(case, marks=pytest.mark.long) for case in OTHERS if case[1] == tied]
    return [case for case in CASES if case[1] == tied] + others


@pytest.mark.parametrize("case", chosen(tied=False), ids=name)
def test_a_schedule_changes_no_bit_of_an_untied_model(runs: Runs, case: Case) -> None:
    trace, like = runs.trace(case), runs.trace(like_1f1b(case))
    for step in range(STEPS):
        assert [key for key, ratio, _ in differences(like, trace, step) if ratio != 0] == [], (
            f"step {step + 1}"
        )


@pytest.mark.parametrize("case", chosen(tied=True), ids=name)
def test_a_schedule_of_a_tied_model_equals_one_process(runs: Runs, case: Case) -> None:
    verdict = runs.spread().judge(runs.trace(case))
    assert not verdict.first, "; ".join(map(str, verdict.first))


def test_checkpoints_pass_between_schedules_bit_for_bit(tmp_path: Path) -> None:
    """A run that changes its schedule at each restart, against one that keeps 1F1B."""

    def keys(run: str, steps: int, schedule: str) -> dict[str, Any]:
        made = run_document(
            tmp_path, run, {"pipe": 2, "zero": 2, "schedule": schedule}, train={"steps": steps}
        )
        made["megalite"]["model"] |= {"num_hidden_layers": 6, "tie_word_embeddings": False}
        return made

    changing = [
        keys("changing", steps, name)
        for steps, name in ((2, "1f1b"), (4, "zb-v"), (5, "interleaved"))
    ]
    runs = [*changing, keys("changing", 6, "zb-h1"), keys("plain", 6, "1f1b")]
    assert run_ranks(2, train, [(run, nothing) for run in runs]) == [[0] * 5] * 2
    changed, plain = (rows(tmp_path / run) for run in ("changing", "plain"))
    assert [row["loss"] for row in changed] == [row["loss"] for row in plain]
    one, two = (Checkpoint.open(find_checkpoint(tmp_path / run)) for run in ("changing", "plain"))
    for tensor in one.names:
        for kind in KINDS:
            assert one.read(tensor, kind=kind).equal(two.read(tensor, kind=kind)), (
                f"{kind} of {tensor}"
            )
