"""The context axis: samples divided over ranks, the same training as one process."""

import contextlib
import copy
import io
import json
import re
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.checkpoint.save import Saver, owned_boxes
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.inference.evaluate_program import evaluate_main
from megalite.inference.prepare import model_parser, prepare_model
from megalite.model.families import model_dict
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.mutants import mutants
from megalite.prove.trace import Session, Trace, record
from megalite.prove.verify import Spread
from megalite.training.start import starting_point
from tests.byte_model import save_byte_model
from tests.ranks import run_ranks
from tests.small_models import MODELS
from tests.traces import Request, document, marked_corpus, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import rows, train

STEPS, BATCH, LENGTH = 4, 4, 32
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.2}
BERT_DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
MASKED = {"masked": 0.4, "mask_token_id": 3, "special_token_ids": [0, 1, 2]}
APART = {"reset_attention": True}
ENCODER = {**APART, "objective": MASKED, "loss": "all"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (MODELS["llama"], {}),
    "documents": ({**MODELS["llama"], "tie_word_embeddings": True}, APART),
    "gpt2": ({**MODELS["gpt2"], **DROPOUT, "tie_word_embeddings": True}, APART),
    "one key head, window": (
        {**MODELS["llama"], "model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 9},
        {},
    ),
    "bert": ({**MODELS["bert"], **BERT_DROPOUT}, ENCODER),
    "modernbert": (MODELS["modernbert"], ENCODER),
    "mixtral": (MODELS["mixtral"], APART),
}
"""By name a model, and keys of megalite.data."""
Case = tuple[str, Layout, str]
CASES: list[Case] = [
    ("llama", Layout(context=4, zero=3), "gather"),
    ("llama", Layout(context=2, data=2, zero=1), "gather"),
    ("llama", Layout(context=2, tensor=2, zero=2, sequence=True), "heads"),
    ("documents", Layout(context=2, pipe=2, zero=1, micro=1), "gather"),
    ("documents", Layout(context=2, data=2, zero=2, micro=1), "heads"),
    ("gpt2", Layout(context=2, tensor=2, zero=2, sequence=True), "gather"),
    ("gpt2", Layout(context=2, pipe=2, zero=2, micro=1, schedule="zb-h1"), "heads"),
    ("one key head, window", Layout(context=4, zero=0), "gather"),
    ("one key head, window", Layout(context=4, zero=1), "heads"),
    ("bert", Layout(context=2, data=2, zero=2), "gather"),
    ("modernbert", Layout(context=2, pipe=2, zero=1, micro=1, schedule="zb-v"), "gather"),
    ("mixtral", Layout(context=2, data=2, expert=2, zero=1, micro=1), "gather"),
]
LONG: list[Case] = [
    ("llama", Layout(context=2, pipe=2, tensor=2, zero=2, micro=1), "gather"),
    ("llama", Layout(context=4, tensor=2, zero=1, sequence=True), "gather"),
    ("llama", Layout(context=4, data=2, zero=0), "gather"),
    ("documents", Layout(context=2, pipe=2, data=2, zero=2, micro=1), "gather"),
    ("documents", Layout(context=4, data=2, zero=3), "gather"),
    ("documents", Layout(context=2, pipe=4, zero=1, micro=1, schedule="zb-h1"), "gather"),
    ("gpt2", Layout(context=4, tensor=2, zero=3), "gather"),
    ("gpt2", Layout(context=4, data=2, zero=2), "heads"),
    ("gpt2", Layout(context=2, pipe=2, tensor=2, zero=1, micro=1, sequence=True), "heads"),
    ("one key head, window", Layout(context=4, tensor=2, zero=2, sequence=True), "gather"),
    ("one key head, window", Layout(context=2, tensor=2, data=2, zero=3), "heads"),
    ("modernbert", Layout(context=4, data=2, zero=3), "heads"),
    ("modernbert", Layout(context=2, pipe=2, tensor=2, zero=2, micro=1), "gather"),
]
RECOMPUTE = {"llama": "selective", "gpt2": "full", "documents": 2}


def name(case: Case) -> str:
    return f"{case[0]}: {case[1]} {case[2]}"


class Runs:
    """Records the cases that tests need, all cases of a world size at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, marked_corpus(folder / "corpus")
        self.recorded: dict[str, Trace] = {}

    def config(self, case: Case) -> Config:
        run, layout, attention = case
        model, data = RUNS[run]
        json = document(self.corpus, "llama", False, BATCH)
        json["megalite"]["model"] = model
        json["megalite"]["data"] |= {"sequence_length": LENGTH, **data}
        if layout.context > 1:
            json["megalite"]["parallel"] = {"context": 2, "context_attention": attention}
            json["megalite"]["train"]["activation_checkpointing"] = RECOMPUTE.get(run, "none")
        return config_of(Config.from_dict(json), layout, BATCH)

    def record(self, cases: list[Case]) -> dict[str, Trace]:
        requests: list[Request] = [
            (self.config(case).to_json(), nothing, self.folder / name(case)) for case in cases
        ]
        found = traces(cases[0][1].world_size, STEPS, requests)
        return dict(zip(map(name, cases), found, strict=True))

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self, run: str) -> Spread:
        """The spread of one process between micro-batch sizes."""
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        reference, *others = self.record([(run, layout, "gather") for layout in layouts]).values()
        return Spread(reference, others)

    def trace(self, case: Case) -> Trace:
        if name(case) not in self.recorded:
            every = CASES if case in CASES else LONG
            self.recorded |= self.record(
                [other for other in every if other[1].world_size == case[1].world_size]
            )
        return self.recorded[name(case)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)], ids=name
)
def test_divided_samples_train_as_in_one_process(runs: Runs, case: Case) -> None:
    spread, trace = runs.spread(case[0]), runs.trace(case)
    verdict = spread.judge(trace)
    assert trace.steps == STEPS and not verdict.first, "; ".join(map(str, verdict.first))


RUN = {"checkpoint_interval": 2, "steps": 4}


def test_a_run_resumes_on_any_size_of_the_axis(tmp_path: Path) -> None:
    """Two steps on context 2, two on context 1; on context 4 the run is already complete."""
    layouts = [{"context": 2, "zero": 2}, {"zero": 1}, {"context": 2, "tensor": 2, "zero": 1}]
    runs = []
    for layout, steps in zip(layouts, (2, 4, 6), strict=True):
        keys = run_document(tmp_path, "moved", layout, train={**RUN, "steps": steps})
        keys["megalite"]["data"] |= {"sequence_length": 16, "valid": [str(tmp_path / "corpus")]}
        keys["megalite"]["train"] |= {"eval_interval": 3, "eval_steps": 1}
        runs.append(keys | {"train_micro_batch_size_per_gpu": 1})
    whole = copy.deepcopy(runs[1])
    whole["megalite"]["train"] |= {"run_dir": str(tmp_path / "whole"), "steps": 6}
    (tmp_path / "whole").mkdir()
    assert run_ranks(4, train, [(keys, nothing) for keys in (*runs, whole)]) == [[0] * 4] * 4
    moved, unmoved = rows(tmp_path / "moved"), rows(tmp_path / "whole")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in moved] == pytest.approx([row[key] for row in unmoved], rel=1e-5)


def moved_states(rank: int, world_size: int, configs: list[dict[str, Any]], folder: Path) -> None:
    """Saves a run after a step; each of the other layouts loads it and saves it again."""
    deepspeed.init_distributed("gloo")
    source = folder / "0"
    for number, config in enumerate(configs):
        session = Session.build(Config.from_dict(config))
        if number == 0:
            session.step(0)
        else:
            starting_point(source, None).fill(session.engine)
        replicated = session.config.zero_stage == 0
        boxes = owned_boxes(session.engine.shards(), session.engine.grid, replicated)
        saver = Saver(folder / str(number), keep=0)
        state = {**asdict(session.position(1)), "seed": session.config.train.seed}
        saver.save(1, boxes, state | {"model": model_dict(session.config.model)})
        saver.wait()


def test_weights_and_moments_pass_between_sizes_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    layouts = [
        Layout(context=2, data=2, zero=1), Layout(data=4, zero=2), Layout(context=4, zero=3),
        Layout(context=2, tensor=2, zero=0), Layout(context=2, pipe=2, zero=2, micro=1),
    ]  # fmt: skip
    configs = [runs.config(("documents", layout, "gather")).to_json() for layout in layouts]
    run_ranks(4, moved_states, configs, tmp_path)
    first, *others = [
        Checkpoint.open(find_checkpoint(tmp_path / str(number))) for number in range(len(configs))
    ]
    for layout, other in zip(layouts[1:], others, strict=True):
        assert sorted(other.names) == sorted(first.names)
        for tensor, kind in product(first.names, ("weight", "exp_avg", "exp_avg_sq")):
            one, two = first.read(tensor, kind=kind), other.read(tensor, kind=kind)
            assert torch.equal(one, two), f"{layout}: {kind} {tensor}"


def evaluated(rank: int, world_size: int, arguments: list[str]) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate_main(arguments) == 0
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def test_evaluate_scores_a_corpus_on_divided_samples(runs: Runs, tmp_path: Path) -> None:
    folder = save_byte_model(tmp_path / "hf")
    arguments = ["--checkpoint", str(folder), "--data", runs.corpus, "--sequence-length", "16"]
    arguments.append("megalite.data.loss=marked")
    ((alone,),) = run_ranks(1, evaluated, arguments, init=False)
    divided = [*arguments, "megalite.parallel.context=2", "megalite.parallel.pipe=2"]
    for keys in ([], ["megalite.parallel.context_attention=heads"]):
        found = run_ranks(4, evaluated, [*divided, *keys], init=False)[0][0]
        assert found["tokens"] == alone["tokens"]
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["megalite.parallel.context=2"],
            "megalite.parallel.context: 2: is for training and evaluate.py --data; must be left out here",
        ),
        (["megalite.parallel.schedule=zb-v"], "schedule: zb-v: is for training; must be left out"),
    ],
)
def test_generation_refuses_the_axis(tmp_path: Path, arguments: list[str], line: str) -> None:
    options = model_parser("generate.py").parse_args(
        ["--checkpoint", str(save_byte_model(tmp_path / "hf")), *arguments]
    )
    with pytest.raises(ConfigError, match=re.escape(line)):
        prepare_model(options, 2)


def test_the_axis_is_part_of_a_layouts_name() -> None:
    layout = Layout.parse("data=2,context=2,zero=1")
    assert (layout.world_size, layout.parallel["context"]) == (4, 2)
    assert str(layout) == "pipe=1,tensor=1,data=2,context=2,zero=1"
    assert Layout().parallel["context_attention"] == "gather"


PLANTED = (
    "rows._GatherRows.backward: the sum is missing",
    "rows._GatherRows.backward: the sum is computed twice",
    "the last context rank has the positions of the first",
    "documents are not kept apart",
    "layers.*.mlp.up.weight: gradient of the last context rank is lost",
)


def with_mutants(rank: int, world_size: int, config: dict[str, Any], folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    resolved = Config.from_dict(config)
    for name in PLANTED:
        made = folder / name
        made.mkdir(exist_ok=True)
        torch.distributed.barrier()
        record(resolved, 2, made, mutants(resolved)[name])


def test_planted_faults_of_the_axis_are_found(runs: Runs, tmp_path: Path) -> None:
    config = runs.config(("documents", Layout(context=2, zero=1, micro=2), "gather"))
    run_ranks(2, with_mutants, config.to_json(), tmp_path)
    layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
    requests: list[Request] = [
        (runs.config(("documents", layout, "gather")).to_json(), nothing, tmp_path / str(layout))
        for layout in layouts
    ]
    reference, *others = traces(1, 2, requests)
    spread = Spread(reference, others)
    for name in PLANTED:
        assert spread.judge(Trace(tmp_path / name)).first, f"not found: {name}"
