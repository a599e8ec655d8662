"""Evaluation on ranks: when a run evaluates; launcher/evaluate.py reading a corpus as the run did; accuracy of
labels."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalite.checkpoint.files import CheckpointWriter
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import marks_prefix
from megalite.hub.hf_folder import HFFolder
from megalite.inference.evaluate_program import evaluate_main
from tests.byte_model import save_byte_model
from tests.families import VOCABULARY
from tests.ranks import RankFailure, run_ranks
from tests.training_runs import document, nothing, train

TUNED = {"samples": "packed", "loss": "marked", "reset_attention": True, "eod_mask_loss": False}
LABELS = [" red", " green", " redder"]


def evaluated(rank: int, world_size: int, arguments: list[str]) -> list[dict[str, Any]]:
    """The program's output on a rank."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert evaluate_main(arguments) == 0
    return [json.loads(line) for line in printed.getvalue().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("evaluate") / "hf")


def tuned_checkpoint(folder: Path, target: Path) -> Path:
    """The folder's weights as a run with TUNED would leave them."""
    source = HFFolder(folder)
    state = {"step": 1, "consumed_samples": 0, "consumed_tokens": 0, "seed": 0, "layout": None}
    state |= {"tokenizer": str(folder), "sequence_length": 24, "data": TUNED}
    with CheckpointWriter(target, source.model, state) as writer:
        for name in source.names:
            writer.add(name, source.read(name))
    return target


@torch.no_grad()
def test_a_corpus_is_read_as_the_run_read_its_own(folder: Path, tmp_path: Path) -> None:
    random, prefix = np.random.default_rng(0), tmp_path / "corpus"
    documents = [random.integers(0, VOCABULARY, int(n)) for n in random.integers(2, 20, 13)]
    marks = [random.integers(0, 2, len(document)) for document in documents]
    for path, parts, dtype in (
        (prefix, documents, np.uint16),
        (marks_prefix(str(prefix)), marks, np.uint8),
    ):
        with IndexedWriter(path, dtype) as writer:
            for part in parts:
                writer.add_document(part)
    checkpoint = tuned_checkpoint(folder, tmp_path / "checkpoint")
    arguments = ["--checkpoint", str(checkpoint), "--data", str(prefix), "megalite.parallel.pipe=2"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = [
        torch.nn.functional.cross_entropy(
            model(torch.tensor(document[None])).logits[0, :-1],
            torch.tensor(document[1:]),
            reduction="none",
        )
        for document in documents
    ]
    chosen = torch.cat(
        [loss[torch.tensor(mark[1:]) == 1] for loss, mark in zip(losses, marks, strict=True)]
    )
    for overrides, wanted in (([], chosen), (["megalite.data.loss=all"], torch.cat(losses))):
        (line,) = run_ranks(2, evaluated, [*arguments, *overrides], init=False)[0]
        assert line["tokens"] == len(wanted) and line["loss"] == pytest.approx(
            wanted.mean().item(), rel=1e-5
        )
    assert line["data"] == {"sequence_length": 24, **TUNED, "loss": "all", "objective": "causal"}

    # A Hugging Face folder does not say whether the marks count.
    with pytest.raises(RankFailure, match=r"exit code 2(.|\n)*megalite.data.loss: missing"):
        run_ranks(1, evaluated, ["--checkpoint", str(folder), "--data", str(prefix)], init=False)


@torch.no_grad()
def test_accuracy_is_the_share_of_lines_whose_label_is_likeliest(
    folder: Path, tmp_path: Path
) -> None:
    random, model = np.random.default_rng(1), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        "".join(random.choice(list("abcdefgh "), size)) + "\nLabel:"
        for size in random.integers(1, 30, 24)
    ]
    truth = [LABELS[i] for i in random.integers(0, len(LABELS), len(prompts))]
    right = []
    for prompt, label in zip(prompts, truth, strict=True):
        scores = []
        for other in LABELS:
            before, ids = (
                tokenizer.encode(prompt),
                tokenizer.encode(prompt + other) + [tokenizer.eos_token_id],
            )
            found = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scores.append(sum(found[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
        right.append(LABELS[int(np.argmax(scores))] == label)
    lines = [{"prompt": p, "completion": label} for p, label in zip(prompts, truth, strict=True)]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--checkpoint", str(folder), "--labelled", str(file), "megalite.parallel.tensor=2"]
    for printed in run_ranks(4, evaluated, arguments, init=False)[:1]:
        assert printed[0]["accuracy"] == pytest.approx(np.mean(right)) and printed[0][
            "lines"
        ] == len(prompts)
        assert list(printed[0]["by_label"]) == sorted(label.strip() for label in LABELS)
    assert 0 < np.mean(right) < 1  # or the comparison says nothing


def test_a_run_evaluates_at_its_interval_and_at_the_last_step_or_never(tmp_path: Path) -> None:
    runs = []
    for interval in (0, 2):
        made = document(
            tmp_path,
            str(interval),
            {},
            train={"steps": 3, "eval_interval": interval, "eval_steps": 1},
        )
        made["megalite"]["data"]["valid"] = made["megalite"]["data"]["train"]
        runs.append((made, nothing))
    assert run_ranks(1, train, runs) == [[0, 0]]
    for interval, wanted in ((0, []), (2, [2, 3])):
        rows = map(
            json.loads, (tmp_path / str(interval) / "metrics.jsonl").read_text().splitlines()
        )
        assert [row["step"] for row in rows if "valid_loss" in row] == wanted
