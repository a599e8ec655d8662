"""Prefix language models (bidirectional prompts), on layouts and end to end: trained, evaluated, exported, read
again."""

import contextlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megalite.api import load
from megalite.commands import export_hf, import_hf
from megalite.config import Config
from megalite.data.preprocessing import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.inference.evaluate_program import evaluate_main
from megalite.inference.generate import Generator
from megalite.parallel.grid import Grid
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread
from tests.byte_model import save_byte_model
from tests.distributed.test_translation import PAIRS, write_pairs
from tests.ranks import run_ranks
from tests.traces import Request, document, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import train
from tests.unit.model.test_prefixes import write_marked

STEPS, BATCH = 4, 8
LAYOUTS = [
    Layout(data=2, zero=3, micro=2),
    Layout(tensor=2, zero=1, micro=4, sequence=True),
    Layout(pipe=2, zero=1, micro=1, schedule="zb-h1"),
    Layout(pipe=2, tensor=2, zero=2, micro=2, schedule="zb-v", sequence=True),
    Layout(pipe=2, data=2, zero=2, micro=2, schedule="interleaved"),
]
# With attention_dropout attention is unfused, otherwise fused; rotary and learned positions.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.1},
}


class Runs:
    """Records all layouts of a model and a world size when one of them is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorded: dict[tuple[str, Layout], Trace] = {}
        marks = [[0] * (1 + i % 5) + [1] * (2 + i % 4) for i in range(120)]
        write_marked(folder / "corpus", marks)

    def request(self, model: str, layout: Layout) -> Request:
        made = document(str(self.folder / "corpus"), model, True, BATCH)
        made["megalite"]["model"] |= MODELS[model]
        made["megalite"]["data"] |= {
            "objective": "prefix",
            "samples": "packed",
            "reset_attention": True,
        }
        config = config_of(Config.from_dict(made), layout, BATCH)
        return config.to_json(), nothing, self.folder / f"{model} {layout}"

    def trace(self, model: str, layout: Layout) -> Trace:
        if (model, layout) not in self.recorded:
            cases = [
                (name, other)
                for name in MODELS
                for other in LAYOUTS
                if other.world_size == layout.world_size
            ]
            found = traces(layout.world_size, STEPS, [self.request(*case) for case in cases])
            self.recorded |= dict(zip(cases, found, strict=True))
        return self.recorded[model, layout]

    @cache  # noqa: B019  (one object, which lives as long as the module's tests)
    def spread(self, model: str) -> Spread:
        layouts = [Layout(zero=0, micro=size) for size in micro_sizes(BATCH, 4)]
        reference, *others = traces(1, STEPS, [self.request(model, layout) for layout in layouts])
        return Spread(reference, others)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("prefixes"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_a_layout_equals_one_process(runs: Runs, model: str, layout: Layout) -> None:
    verdict = runs.spread(model).judge(runs.trace(model, layout))
    assert not verdict.first, "; ".join(map(str, verdict.first))


def evaluated(rank: int, world_size: int, arguments: list[str]) -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate_main(arguments) == 0
    return json.loads(printed.getvalue() or "{}")


def test_a_run_translates_as_it_was_trained_and_so_do_its_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on pipe 2 until it has memorized three pairs; reading the prompts causally would not reproduce them."""
    folder = save_byte_model(tmp_path / "byte")
    lines = write_pairs(tmp_path / "lines.jsonl", PAIRS)
    preprocess([lines], folder, tmp_path / "pairs", template="{source}=>")
    prompts = [f"{source}=>" for source, _ in PAIRS]
    showing = {"sample_prompts": prompts, "sample_tokens": 10, "eval_interval": 30}
    made = run_document(tmp_path, "run", {"pipe": 2}, train={"steps": 60, **showing})
    made["megalite"]["model"] |= {"vocab_size": 131, "max_position_embeddings": 64}
    pairs = [str(tmp_path / "pairs")]
    made["megalite"]["data"] = {
        "tokenizer": str(folder),
        "sequence_length": 32,
        "train": pairs,
        "valid": pairs,
        "samples": "packed",
        "reset_attention": True,
        "loss": "marked",
        "objective": "prefix",
    }
    assert run_ranks(2, train, [(made, nothing)], timeout_seconds=120) == [[0], [0]]
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [row for row in rows if "valid_loss" in row][-1]

    # The run's samples equal what its model generates, and both are the translations.
    model = load(tmp_path / "run")
    targets = [target for _, target in PAIRS]
    assert [row["text"] for row in last["samples"]] == targets
    assert [model.generate(prompt, max_new_tokens=12) for prompt in prompts] == targets
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    causal = [text.tokens for text in Generator(model.stage, Grid()).generate(ids, 12)]
    both = [text.tokens for text in Generator(model.stage, Grid(), prefixed=True).generate(ids, 12)]
    assert causal != both
    with pytest.raises(ConfigError, match='contain an answer: a model trained with .* "prefix"'):
        model.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

    assert (
        export_hf.main(["--checkpoint", str(tmp_path / "run"), "--output", f"{tmp_path}/hf"]) == 0
    )
    assert "this model attends to prompts bidirectionally" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["prefix_lm"] is True
    assert import_hf.main(["--model", f"{tmp_path}/hf", "--output", f"{tmp_path}/again"]) == 0
    for name, layout in (("run", "tensor"), ("hf", "pipe"), ("again", "pipe")):
        base = ["--checkpoint", str(tmp_path / name), f"megalite.parallel.{layout}=2"]
        translating = ["--translations", lines, "--template", "{source}=>", "--beams", "2"]
        translating += ["--max-new-tokens", "12"]
        (line, _) = run_ranks(2, evaluated, [*base, *translating], init=False)
        assert line["chrf"] == pytest.approx(100)
        data = ["--data", pairs[0], "--sequence-length", "32"]
        (line, _) = run_ranks(2, evaluated, [*base, *data], init=False)
        assert line["data"]["objective"] == "prefix"
        assert line["loss"] == pytest.approx(last["valid_loss"], rel=1e-3)


def test_a_corpus_without_marks_has_no_prompts(tmp_path: Path) -> None:
    """Its loss is that of a causal model."""
    folder = save_byte_model(tmp_path / "byte")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "prefix_lm": True}))
    lines, text = tmp_path / "text.jsonl", "aufgemacht-und-zugemacht" * 2
    lines.write_text(json.dumps({"text": text}) + "\n")
    preprocess([str(lines)], folder, tmp_path / "text")
    arguments = ["--checkpoint", str(folder), "--data", str(tmp_path / "text")]
    found = run_ranks(1, evaluated, [*arguments, "--sequence-length", "20"], init=False)[0]
    assert found["data"]["objective"] == "causal" and found["tokens"] == 20
    ids = load_tokenizer(folder).encode(text)
    assert found["loss"] == pytest.approx(load(folder).loss(ids[:21]), rel=1e-5)
