"""Text classifiers: every family compared with transformers' class, on one rank and on grids; layouts compared with one
process; a run from a pretrained folder, its evaluation, export and import."""

import json
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from megalite.config import Config
from megalite.data.loader import ValidData
from megalite.errors import CheckpointError
from megalite.hub.export_folder import export_hf
from megalite.hub.hf_folder import HFFolder
from megalite.hub.import_folder import import_hf
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import inference_cut
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread
from tests.classifiers import CONFIGS, LABELS, batch, hf_scores, labelled_corpus, texts
from tests.distributed.test_encoders import DROPOUT, evaluated
from tests.families import (
    FAMILY_CONFIGS,
    Result,
    forward_backward,
    full_gradients,
    hf_model,
    load_hf,
)
from tests.ranks import run_ranks
from tests.small_models import VOCABULARY
from tests.traces import Request, document, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import rows, train
from tests.unit.data.corpora import data_section

GRIDDED = ("llama", "gpt2", "bert", "roberta", "modernbert", "modernbert, mean")
STEPS, BATCH = 3, 8
OBJECTIVE = {"classes": list(LABELS)}
READ = {"objective": OBJECTIVE, "samples": "packed", "reset_attention": True, "loss": "all"}
LAYOUTS = [
    Layout(data=2, zero=3, micro=2),
    Layout(tensor=2, zero=1, micro=4, sequence=True),
    Layout(pipe=2, zero=1, micro=1, schedule="zb-h1"),
    Layout(pipe=2, zero=2, micro=1, schedule="zb-v"),
    Layout(pipe=2, zero=0, micro=2, schedule="interleaved"),
    Layout(pipe=2, tensor=2, zero=2, micro=2, schedule="zb-v", sequence=True),
]


def check(results: list[Result], config: dict[str, Any]) -> None:
    """Compares loss and gradients of the packed texts on a grid with transformers' for each text."""
    _, loss, gradients = hf_scores(config)
    assert max(value for _, value, _ in results) == pytest.approx(loss, rel=1e-5)
    sums = full_gradients(results)
    assert sums.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(
            sums[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text
        )
    for _, _, held in results:  # unsplit parameters are equal on all tensor ranks
        for name, (place, value) in held.items():
            torch.testing.assert_close(value, place.cut(sums[name]), rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_equals_transformers_on_one_rank(name: str) -> None:
    config = CONFIGS[name]
    spec = read_spec(config)
    stage = load_hf(Stage(spec, Grid()), hf_model(config))
    assert spec.labels == LABELS
    assert spec.num_parameters == sum(value.numel() for value in hf_model(config).parameters())
    tokens, labels, context = batch()
    check([forward_backward(stage, tokens, labels, context)], config)
    context.counted = None  # all positions: the same loss
    with torch.no_grad():
        stage.eval()
        loss, *counts = stage(tokens, labels, context).tolist()
        logits = torch.cat([stage(ids.unsqueeze(0)) for ids, _ in texts()])
    expected, total, _ = hf_scores(config)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert loss == pytest.approx(total, rel=1e-5)
    table = torch.zeros(len(LABELS), len(LABELS))
    for (_, label), guess in zip(texts(), expected.argmax(-1).tolist(), strict=True):
        table[label, guess] += 1
    assert counts == table.flatten().tolist()


def on_a_grid(rank: int, world_size: int, pipe: int, tensor: int) -> list[list[Result]]:
    grid = Grid.build(pipe, tensor)
    results = []
    for name in GRIDDED:
        config = CONFIGS[name]
        spec = read_spec(config)
        cut = inference_cut(spec, pipe)
        of_config = []
        for sequence in (False, True):
            stage = load_hf(Stage(spec, grid, cut, sequence=sequence), hf_model(config)).train()
            of_config.append(forward_backward(stage, *batch()))
        results.append(of_config)
    return results


def test_classifiers_equal_transformers_on_pipe_2_tensor_2() -> None:
    results = run_ranks(4, on_a_grid, 2, 2)
    for number, name in enumerate(GRIDDED):
        for sequence in (0, 1):
            check([result[number][sequence] for result in results], CONFIGS[name])


class Runs:
    """Records all cases of a world size when one of them is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorded: dict[tuple[str, Layout], Trace] = {}
        labelled_corpus(folder / "corpus", texts=60, mean=5)

    def request(self, model: str, layout: Layout) -> Request:
        """Several short texts in a sample; dropout on."""
        made = document(str(self.folder / "corpus"), model, model == "bert", BATCH)
        made["megalite"]["model"] |= DROPOUT.get(model, {}) | MEANS.get(model, {})
        made["megalite"]["data"] |= READ
        config = config_of(Config.from_dict(made), layout, BATCH)
        return config.to_json(), nothing, self.folder / f"{model} {layout}"

    def trace(self, model: str, layout: Layout) -> Trace:
        if (model, layout) not in self.recorded:
            every = CASES if (model, layout) in CASES else OTHERS
            together = [case for case in every if case[1].world_size == layout.world_size]
            found = traces(layout.world_size, STEPS, [self.request(*case) for case in together])
            self.recorded |= dict(zip(together, found, strict=True))
        return self.recorded[model, layout]

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self, model: str) -> Spread:
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        reference, *others = traces(1, STEPS, [self.request(model, layout) for layout in layouts])
        return Spread(reference, others)


MODELS_TRIED = ("bert", "modernbert", "gpt2")
Case = tuple[str, Layout]
# Each model takes every second layout of two ranks, and consecutive models take different ones.
CASES: list[Case] = [
    (model, layout)
    for number, model in enumerate(MODELS_TRIED)
    for place, layout in enumerate(LAYOUTS)
    if layout.world_size == 4 or (place + number) % 2 == 0
]
OTHERS: list[Case] = [case for case in product(MODELS_TRIED, LAYOUTS) if case not in CASES]
MEANS = {"modernbert": {"classifier_pooling": "mean", "classifier_dropout": 0.1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("classifiers"))


@pytest.mark.parametrize(
    ("model", "layout"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS)],
    ids=str,
)
def test_a_layout_equals_one_process(runs: Runs, model: str, layout: Layout) -> None:
    verdict = runs.spread(model).judge(runs.trace(model, layout))
    assert not verdict.first, "; ".join(map(str, verdict.first))


def test_a_run_from_a_pretrained_folder_and_out_again(tmp_path: Path) -> None:
    """A masked model's folder -> fine-tuning on pipe 2, resumed on tensor 2 -> the same figures by transformers."""
    hf_model(FAMILY_CONFIGS["bert"]).save_pretrained(tmp_path / "bert")
    texts = labelled_corpus(tmp_path / "corpus", texts=90, mean=5)

    def keys(layout: dict[str, Any], steps: int) -> dict[str, Any]:
        made = run_document(
            tmp_path, "run", layout, train={"steps": steps, "eval_interval": 10, "eval_steps": 99}
        )
        corpus = [str(tmp_path / "corpus")]
        made["optimizer"]["params"]["lr"] = 1e-3
        made["megalite"]["model"] = str(tmp_path / "bert")
        made["megalite"]["data"] |= READ | {"train": corpus, "valid": corpus}
        made["megalite"]["train"]["load"] = str(tmp_path / "bert")
        return made

    starts = [keys({"pipe": 2, "zero": 2, "schedule": "zb-v"}, 20), keys({"tensor": 2}, 40)]
    codes = run_ranks(2, train, [(start, nothing) for start in starts], timeout_seconds=240)
    assert codes == [[0, 0]] * 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    valid = [row for row in map(json.loads, lines) if "valid_loss" in row]
    low, high = valid[-1]["valid_accuracy_interval"]
    assert low < valid[-1]["valid_accuracy"] <= high and valid[-1]["valid_texts"] == 90
    assert valid[-1]["valid_accuracy"] > 0.55 and rows(tmp_path / "run")[0]["loss"] > 0.9

    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "corpus")]
    printed, _ = run_ranks(2, evaluated, [*arguments, "megalite.parallel.pipe=2"], init=False)
    line = json.loads(printed)
    for name in ("accuracy", "macro_f1", "macro_f1_interval", "f1_by_label"):
        assert line[name] == valid[-1][f"valid_{name}"]
    assert line["loss"] == pytest.approx(valid[-1]["valid_loss"], rel=1e-5)

    export_hf(tmp_path / "run", tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "back")
    export_hf(tmp_path / "back", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([ids])).logits for ids, _ in texts])
    labels = torch.tensor([label for _, label in texts])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert line["loss"] == pytest.approx(loss, rel=1e-4)
    assert line["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()


def test_a_classifier_starts_from_the_body_of_a_decoder(tmp_path: Path) -> None:
    """From an untied decoder: everything but its head is loaded, bit for bit."""
    config = {**FAMILY_CONFIGS["llama"], "tie_word_embeddings": False}
    hf_model(config).save_pretrained(tmp_path / "llama")
    labelled_corpus(tmp_path / "corpus", texts=20, mean=5)
    made = run_document(tmp_path, "run", {"pipe": 2}, train={"steps": 1})
    made["optimizer"]["params"]["lr"] = 1e-30  # no weight changes by as little
    made["megalite"]["model"] = str(tmp_path / "llama")
    made["megalite"]["data"] |= READ
    made["megalite"]["train"]["load"] = str(tmp_path / "llama")
    assert run_ranks(2, train, [(made, nothing)], timeout_seconds=120) == [[0], [0]]
    export_hf(tmp_path / "run", tmp_path / "out")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("llama", "out"))
    assert set(before) - set(after) == {"lm_head.weight"}
    assert set(after) - set(before) == {"score.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())


def test_a_pretrained_pooler_is_taken_and_a_label_s_row_is_not(tmp_path: Path) -> None:
    """A folder with BERT's body, whose names lack the prefix of other classes."""
    model = AutoModel.from_config(AutoConfig.for_model(**FAMILY_CONFIGS["bert"]))
    model.save_pretrained(tmp_path)
    folder = HFFolder(tmp_path, LABELS)
    assert folder.made_one and folder.spec.labels == LABELS
    assert torch.equal(folder.read("classifier.dense.weight"), model.pooler.dense.weight)
    assert not any(name.startswith("classifier.output") for name in folder.names)
    with pytest.raises(CheckpointError, match="missing tensor"):
        HFFolder(tmp_path)  # a masked language model has more


def test_the_label_is_at_the_first_token_of_each_text(tmp_path: Path) -> None:
    texts = labelled_corpus(tmp_path / "corpus", texts=30, mean=5)
    prefix = [str(tmp_path / "corpus")]
    data = data_section(prefix, 12, valid=prefix, **READ)
    tokens, labels, documents, _ = ValidData(data, VOCABULARY).batch(range(5))
    assert documents is not None
    wanted = {tuple(ids[:12]): label for ids, label in texts}
    for row in range(5):
        for number in range(documents[row].max()):
            here = documents[row] == number
            assert labels[row][here][0] == wanted[tuple(tokens[row][here].tolist())]
            assert (labels[row][here][1:] == -100).all()
        assert (labels[row][documents[row] == documents[row].max()] == -100).all() or np.all(
            documents[row] < documents[row].max() + 1
        )
