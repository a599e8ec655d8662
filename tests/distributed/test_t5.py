"""T5 end to end: layouts compared with one process, texts with transformers', pairs learnt and translated."""

import contextlib
import io
import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megalite.api import load
from megalite.checkpoint.weights import load_module
from megalite.config import Config
from megalite.data.preprocessing import preprocess
from megalite.engine.zero import ShardedOptimizer
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.inference.beams import Beams
from megalite.inference.generate import Generator, Text
from megalite.inference.generate_program import generate_main
from megalite.inference.sampling import Sampling
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import inference_cut
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread
from tests.byte_model import save_byte_model
from tests.distributed.test_translation import PAIRS, evaluated, write_pairs
from tests.families import FAMILY_CONFIGS, hf_model
from tests.ranks import run_ranks
from tests.small_models import MODELS
from tests.traces import Request, document, marked_corpus, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import train

STEPS, BATCH = 4, 8
SPANS = {
    "span_corruption": 0.3,
    "mean_span": 2,
    "end_token_id": 1,
    "sentinel_token_ids": [130, 129, 128],
}
OF_PAIRS = {
    "objective": {"source_length": 9},
    "samples": "padded",
    "loss": "marked",
    "reset_attention": True,
}
KINDS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "pairs": (False, {"dropout_rate": 0.1}, OF_PAIRS),
    "spans": (
        True,
        {"dropout_rate": 0.1, "feed_forward_proj": "relu"},
        {"objective": SPANS, "loss": "all"},
    ),
}
"""Whether the embedding is the head, the model's keys, the data's."""
LAYOUTS = [
    Layout(data=2, zero=3, micro=2),
    Layout(data=2, zero=0, micro=1),
    Layout(tensor=2, zero=1, micro=4),
    Layout(pipe=2, zero=1, micro=2),
    Layout(pipe=2, zero=0, micro=2, schedule="interleaved"),
    Layout(pipe=2, zero=1, micro=1, schedule="zb-h1"),
    Layout(pipe=2, zero=2, micro=1, schedule="zb-v"),
    Layout(pipe=4, zero=2, micro=2),
    Layout(pipe=4, zero=0, micro=2),
    Layout(pipe=2, tensor=2, zero=2, micro=2),
    Layout(pipe=2, data=2, zero=2, micro=2, schedule="interleaved"),
    Layout(pipe=2, data=2, zero=1, micro=2, schedule="zb-v"),
]
Case = tuple[str, Layout]
# Each variant takes every second layout, the other one the rest.
CASES: list[Case] = [
    (kind, layout)
    for number, kind in enumerate(KINDS)
    for place, layout in enumerate(LAYOUTS)
    if place % 2 == number
]
OTHERS: list[Case] = [case for case in product(KINDS, LAYOUTS) if case not in CASES]


class Runs:
    """Records all cases of a world size when one of them is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, marked_corpus(folder / "corpus")
        self.recorded: dict[Case, Trace] = {}

    def request(self, kind: str, layout: Layout) -> Request:
        tied, model, data = KINDS[kind]
        json = document(self.corpus, "t5", tied, BATCH)
        json["megalite"]["model"] |= model
        json["megalite"]["data"] |= {"sequence_length": 20, **data}
        config = config_of(Config.from_dict(json), layout, BATCH)
        return config.to_json(), nothing, self.folder / f"{kind} {layout}"

    def trace(self, kind: str, layout: Layout) -> Trace:
        if (kind, layout) not in self.recorded:
            every = CASES if (kind, layout) in CASES else OTHERS
            together = [case for case in every if case[1].world_size == layout.world_size]
            found = traces(layout.world_size, STEPS, [self.request(*case) for case in together])
            self.recorded |= dict(zip(together, found, strict=True))
        return self.recorded[kind, layout]

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self, kind: str) -> Spread:
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        reference, *others = traces(1, STEPS, [self.request(kind, layout) for layout in layouts])
        return Spread(reference, others)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS)],
    ids=str,
)
def test_a_layout_equals_one_process(runs: Runs, kind: str, layout: Layout) -> None:
    verdict = runs.spread(kind).judge(runs.trace(kind, layout))
    assert not verdict.first, "; ".join(map(str, verdict.first))


def test_layers_that_are_made_again_change_nothing(runs: Runs) -> None:
    requests = []
    for choice in ("selective", "full", 2):
        keys, fault, folder = runs.request("pairs", Layout(pipe=2, zero=2, micro=2))
        keys["megalite"]["train"]["activation_checkpointing"] = choice
        requests.append((keys, fault, folder.with_name(f"recompute {choice}")))
    for trace in traces(2, STEPS, requests):
        verdict = runs.spread("pairs").judge(trace)
        assert not verdict.first, "; ".join(map(str, verdict.first))


@contextlib.contextmanager
def unsummed(rank: int) -> Iterator[None]:
    with mock.patch.object(ShardedOptimizer, "sum_tied_gradients", lambda self: None):
        yield


def test_tables_whose_gradients_are_not_summed_are_found(runs: Runs) -> None:
    """Each stage holds both tables; the stage whose copy counts is not the one that reads the decoder's."""
    config, _, folder = runs.request("pairs", Layout(pipe=2, zero=1, micro=2))
    (trace,) = traces(2, STEPS, [(config, unsummed, folder.with_name("unsummed"))])
    first = runs.spread("pairs").judge(trace).first
    assert any("_bias.weight" in str(difference) for difference in first), first


SOURCES = [[5, 9, 3, 2], [77, 2], [11, 12, 13, 14, 15, 16, 17, 2], [130, 0, 64, 2]]
NEW, STOPS = 6, [*range(0, 30)]
SAMPLED = Sampling(temperature=1.3, top_k=20, seed=3, repetition_penalty=1.3)
NAMES = ("t5", "t5 original")


def texts(
    rank: int, world_size: int, pipe: int, tensor: int, folders: list[Path]
) -> list[list[list[Text]]]:
    grid, results = Grid.build(pipe, tensor), []
    for path in folders:
        folder = HFFolder(path)
        stage = Stage(folder.spec, grid, inference_cut(folder.spec, grid.pipe.size))
        load_module(folder.read, stage)
        generator = Generator(stage, grid, batch_size=3)
        results.append(
            [
                generator.generate(SOURCES, NEW, stop_ids=STOPS),
                generator.generate(SOURCES, NEW, stop_ids=STOPS, beams=Beams(3)),
                generator.generate(SOURCES, NEW, SAMPLED),
            ]
        )
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name in NAMES:
        made.append(tmp_path_factory.mktemp("model"))
        hf_model(FAMILY_CONFIGS[name]).save_pretrained(made[-1])
    return made


def test_texts_are_those_of_transformers_on_every_layout(folders: list[Path]) -> None:
    """Sources of several lengths in a batch; greedy and beam search."""
    (one,) = run_ranks(1, texts, 1, 1, folders)
    lengths = set()
    for name, (greedy, beams, sampled) in zip(NAMES, one, strict=True):
        model = hf_model(FAMILY_CONFIGS[name])
        for count, found in ((1, greedy), (3, beams)):
            for text in found:
                ids = torch.tensor([text.prompt])
                wanted = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                    num_beams=count, eos_token_id=STOPS, decoder_start_token_id=7, pad_token_id=0,
                    use_cache=False,  # transformers' has as many layers as the encoder
                )[0, 1:].tolist()  # fmt: skip
                assert text.tokens == wanted, (name, count)
                lengths.add(len(wanted))
        assert [text.tokens for text in sampled] != [text.tokens for text in greedy]
    assert len(lengths) > 2
    for pipe, tensor in ((2, 2), (3, 1)):
        for found in run_ranks(pipe * tensor, texts, pipe, tensor, folders):
            assert found == one


def generated(rank: int, world_size: int, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert generate_main(arguments) == 0
    return printed.getvalue()


def test_a_model_that_has_learnt_its_pairs_translates_them(tmp_path: Path) -> None:
    """Trained on pipe 2 until it has memorized three pairs; evaluated, exported, and used from Python."""
    folder = save_byte_model(tmp_path / "byte")
    lines = write_pairs(tmp_path / "lines.jsonl", PAIRS)
    preprocess([lines], folder, tmp_path / "pairs", template="{source}")
    made = run_document(tmp_path, "run", {"pipe": 2}, train={"steps": 80})
    made["megalite"]["model"] = {**MODELS["t5"], "tie_word_embeddings": False}
    made["megalite"]["data"] = {
        "tokenizer": str(folder),
        "sequence_length": 24,
        "train": [str(tmp_path / "pairs")],
        **OF_PAIRS,
        "objective": {"source_length": 12},
    }
    assert run_ranks(2, train, [(made, nothing)], timeout_seconds=120) == [[0], [0]]
    lines = write_pairs(tmp_path / "asked.jsonl", PAIRS)
    written = tmp_path / "written.jsonl"
    base = ["--checkpoint", str(tmp_path / "run"), "--translations", lines, "--write", str(written)]
    base += ["--template", "{source}", "--max-new-tokens", "12"]
    for beams, layout in (([], "tensor"), (["--beams", "3"], "pipe")):
        arguments = [*base, *beams, f"megalite.parallel.{layout}=2"]
        line = json.loads(run_ranks(2, evaluated, arguments, init=False)[0])
        texts = [json.loads(row)["translation"] for row in written.read_text().splitlines()]
        assert texts == [target for _, target in PAIRS] and line["chrf"] == 100
        written.unlink()
    export_hf(tmp_path / "run", tmp_path / "out", verify=True)
    (source, target), *_ = PAIRS
    asked = [
        "--checkpoint",
        str(tmp_path / "out"),
        "--prompt",
        source,
        "megalite.parallel.tensor=2",
    ]
    line = json.loads(run_ranks(2, generated, asked, init=False)[0])
    assert line == {"prompt": source, "text": target}
    model = load(tmp_path / "out")
    assert [model.generate(source, 12) for source, _ in PAIRS] == [target for _, target in PAIRS]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["T5ForConditionalGeneration"]
    assert settings["tie_word_embeddings"] is False
    corpus = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "pairs")]
    line = json.loads(run_ranks(2, evaluated, [*corpus, "megalite.parallel.pipe=2"], init=False)[0])
    assert line["loss"] < 0.2 and line["tokens"] == sum(len(target) + 1 for _, target in PAIRS)
