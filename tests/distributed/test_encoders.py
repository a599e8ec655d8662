"""Encoders from end to end: what is refused, and masked language modelling on layouts and over restarts."""

import contextlib
import io
import json
import math
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from megalite.config import Config
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import ValidData
from megalite.inference.evaluate_program import evaluate_main
from megalite.prove.layouts import Layout, config_of, micro_sizes
from megalite.prove.trace import Trace
from megalite.prove.verify import Spread
from tests.families import FAMILY_CONFIGS, hf_model
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.small_models import MODELS, VOCABULARY
from tests.traces import LENGTH, Request, document, nothing, traces
from tests.training_runs import document as run_document
from tests.training_runs import rows, train
from tests.unit.data.corpora import data_section, write_corpus

STEPS, BATCH = 4, 8
MASKED = {"masked": 0.3, "mask_token_id": 4, "special_token_ids": [0, 1, 2, 3]}
WHOLE: dict[str, Any] = {"masked": [0.5, 0.1], "whole_word": True}
DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "modernbert": {"embedding_dropout": 0.1, "attention_dropout": 0.1},
}
LAYOUTS = [
    Layout(data=2, zero=3, micro=2),
    Layout(data=2, zero=0, micro=1),
    Layout(tensor=2, zero=1, micro=4, sequence=True),
    Layout(pipe=2, zero=1, micro=2),
    Layout(pipe=2, zero=0, micro=2, schedule="interleaved"),
    Layout(pipe=2, zero=1, micro=1, schedule="zb-h1"),
    Layout(pipe=2, zero=2, micro=1, schedule="zb-v"),
    Layout(pipe=2, tensor=2, zero=2, micro=2, schedule="zb-v", sequence=True),
    Layout(pipe=2, data=2, zero=2, micro=2, schedule="zb-h1"),
]
Case = tuple[str, Layout]
# Each model takes every second layout of two ranks, the other model the rest.
CASES: list[Case] = [
    (model, layout)
    for number, model in enumerate(DROPOUT)
    for place, layout in enumerate(LAYOUTS)
    if layout.world_size == 4 or place % 2 == number
]
OTHERS: list[Case] = [case for case in product(DROPOUT, LAYOUTS) if case not in CASES]


def word_masks(folder: Path) -> dict[str, Any]:
    """Keys of `megalite.data` that mask whole words, of a tokenizer half of whose tokens continue one."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"##{number}" if number % 2 else f"{number}" for number in range(5, VOCABULARY)]
    made = Tokenizer(WordPiece({token: i for i, token in enumerate([*special, *words])}))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=made, **dict(zip(names, special, strict=True))
    ).save_pretrained(folder)
    return {"tokenizer": str(folder), "objective": WHOLE}


class Runs:
    """Records all cases of a world size when one of them is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.corpus = folder, str(folder / "corpus")
        self.masks = {"bert": word_masks(folder / "words"), "modernbert": {"objective": MASKED}}
        self.recorded: dict[Case, Trace] = {}
        write_corpus(folder / "corpus", documents=60, mean=10, vocabulary=VOCABULARY)

    def request(self, model: str, layout: Layout) -> Request:
        """Documents of about ten tokens, packed whole and kept apart; dropout on; BERT's masks are of words, of a share
        that changes."""
        json = document(self.corpus, model, True, BATCH)
        json["megalite"]["model"] |= DROPOUT[model]
        json["megalite"]["data"] |= {
            "loss": "all",
            "samples": "packed",
            "reset_attention": True,
            **self.masks[model],
        }
        config = config_of(Config.from_dict(json), layout, BATCH)
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("encoders"))


@pytest.mark.parametrize(
    ("model", "layout"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS)],
    ids=str,
)
def test_a_layout_equals_one_process(runs: Runs, model: str, layout: Layout) -> None:
    verdict = runs.spread(model).judge(runs.trace(model, layout))
    assert not verdict.first, "; ".join(map(str, verdict.first))


def test_a_loss_falls_below_the_unigram_entropy_over_a_restart_on_another_layout(
    tmp_path: Path,
) -> None:
    """Documents of one word each: a token is determined only by the tokens on both sides of it."""
    random, ids, steps = np.random.default_rng(0), 40, 100
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(400):
            writer.add_document(np.full(LENGTH, 5 + random.integers(ids)))

    def keys(run: str, layout: dict[str, Any], steps: int) -> dict[str, Any]:
        made = run_document(
            tmp_path, run, layout, train={"steps": steps, "eval_interval": steps // 2}
        )
        made["megalite"]["model"] = {
            **MODELS["bert"],
            "num_hidden_layers": 3,
            "initializer_range": 0.1,
        }
        corpus = [str(tmp_path / "corpus")]
        made["megalite"]["data"] |= {"train": corpus, "valid": corpus, "objective": MASKED}
        return made

    first = keys("changing", {"pipe": 2, "zero": 2, "schedule": "zb-v"}, steps // 2)
    starts = [first, keys("changing", {"tensor": 2}, steps), keys("one", {"pipe": 2}, 10)]
    assert (
        run_ranks(2, train, [(start, nothing) for start in starts], timeout_seconds=300)
        == [[0, 0, 0]] * 2
    )
    changing, one = (rows(tmp_path / run) for run in ("changing", "one"))
    for step in range(10):  # later, rounding has grown
        assert changing[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
    lines = (tmp_path / "changing" / "metrics.jsonl").read_text().splitlines()
    losses = [row["valid_loss"] for row in map(json.loads, lines) if "valid_loss" in row]
    assert changing[0]["loss"] > math.log(ids) and losses[-1] < 0.5 * math.log(ids), losses


def test_the_share_of_words_that_are_masked_follows_the_steps_over_a_restart(
    tmp_path: Path,
) -> None:
    """On another layout and with another micro-batch size; the first step is that of a share that does not change."""
    masks, steps = word_masks(tmp_path / "words"), 6

    def keys(run: str, layout: dict[str, Any], **objective: Any) -> dict[str, Any]:
        timing = {"steps": steps, "checkpoint_interval": steps // 2, "keep_checkpoints": 0}
        made = run_document(tmp_path, run, layout, train=timing)
        made["megalite"]["model"] = MODELS["bert"]
        made["megalite"]["data"] |= {**masks, "objective": WHOLE | objective}
        return made

    pipe = {"pipe": 2, "zero": 2, "schedule": "zb-h1"}
    starts = [keys("whole", pipe), keys("flat", pipe, masked=WHOLE["masked"][0])]
    assert run_ranks(2, train, [(start, nothing) for start in starts]) == [[0, 0]] * 2
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    checkpoints = tmp_path / "resumed" / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{steps:08d}")
    (checkpoints / "latest").write_text(f"step_{steps // 2:08d}")
    resumed = keys("resumed", {"tensor": 2}) | {"train_micro_batch_size_per_gpu": 4}
    assert run_ranks(2, train, [(resumed, nothing)]) == [[0]] * 2
    whole, flat, again = (
        [row["loss"] for row in rows(tmp_path / run)] for run in ("whole", "flat", "resumed")
    )
    assert whole[0] == flat[0] and whole[1] != flat[1]
    starts_at = [row["step"] for row in rows(tmp_path / "resumed") if "weights_bytes" in row]
    assert starts_at == [1, steps // 2 + 1] and len(again) == steps
    assert again == pytest.approx(whole, rel=1e-5)


def evaluated(rank: int, world_size: int, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate_main(arguments) == 0
    return printed.getvalue()


@torch.no_grad()
def test_an_evaluation_is_that_of_transformers_on_the_same_masks(tmp_path: Path) -> None:
    model = hf_model(FAMILY_CONFIGS["roberta"])
    model.save_pretrained(tmp_path / "hf")
    write_corpus(tmp_path / "corpus", 20, vocabulary=VOCABULARY)
    keys = [f"megalite.data.objective={json.dumps(MASKED)}", "megalite.parallel.pipe=2"]
    arguments = ["--checkpoint", str(tmp_path / "hf"), "--data", str(tmp_path / "corpus"), *keys]
    (printed, _) = run_ranks(2, evaluated, arguments, init=False)
    line = json.loads(printed)
    assert line["data"]["objective"] == {"keep": 0.1, "swap": 0.1, "whole_word": False, **MASKED}
    data = data_section([tmp_path / "corpus"], line["data"]["sequence_length"], valid=[str(tmp_path / "corpus")],
                        objective=MASKED)  # fmt: skip
    valid = ValidData(data, VOCABULARY)
    tokens, labels, *_ = valid.batch(range(valid.num_samples))
    logits = model(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(labels).flatten()
    )
    assert (
        line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        and line["tokens"] == (labels != -100).sum() > 50
    )


@pytest.mark.parametrize(
    ("program", "asked", "use"),
    [
        ("generate.py", ("--prompt", "a"), "generation"),
        ("evaluate.py", ("--labelled", "labels.jsonl"), "--labelled"),
        ("evaluate.py", ("--tasks", "arc_easy"), "--tasks"),
    ],
)
def test_what_needs_a_decoder_refuses_an_encoder_in_a_line(
    program: str, asked: tuple[str, ...], use: str, tmp_path: Path
) -> None:
    hf_model(FAMILY_CONFIGS["bert"]).save_pretrained(tmp_path)
    done = run_program(f"launcher/{program}", "--checkpoint", str(tmp_path), *asked)
    rule = f"--checkpoint: {tmp_path}: a bert model is an encoder: {use} needs a decoder, such as llama"
    assert done.returncode == 2 and rule in done.stderr, done.stderr
