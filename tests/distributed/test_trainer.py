"""tools/classify_with_transformers.py: the Trainer starts like a run of ours, and ends close to it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from megalite.commands import export_hf
from megalite.data.indexed import IndexedCorpus, labels_prefix, names_file
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.packing import best_fit
from tests.ranks import REPOSITORY, run_ranks
from tests.small_models import MODELS
from tests.training_runs import LENGTH, VOCABULARY, document, nothing, rows, train

CLASSES = ["low", "middle", "high"]


def labelled_corpus(prefix: Path, texts: int) -> str:
    """Texts of a few tokens, each label with its own third of the vocabulary; 0 is padding."""
    random, third = np.random.default_rng(0), (VOCABULARY - 1) // 3
    with (
        IndexedWriter(prefix, np.uint16) as tokens,
        IndexedWriter(Path(labels_prefix(prefix)), np.uint8) as labels,
    ):
        for number in range(texts):
            label, length = number % 3, 2 + number % 4
            tokens.add_document(1 + label * third + random.integers(0, third, length))
            labels.add_document(np.full(length, label))
    names_file(prefix).write_text(json.dumps({"classes": CLASSES}))
    return str(prefix)


def test_the_trainer_starts_from_a_run_s_weights_and_learns_as_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = [labelled_corpus(tmp_path / "texts", 60)]
    saving = {"faults": {"not_finite": "rewind"}, "keep_checkpoints": 0}  # and so it saves step 0
    made = document(tmp_path, "run", {}, train={"steps": 12, "eval_interval": 12, **saving})
    made["megalite"]["model"] = {**MODELS["llama"], "pad_token_id": 0}
    made["megalite"]["data"] |= {
        "train": corpus,
        "valid": corpus,
        "samples": "packed",
        "reset_attention": True,
        "objective": {"classes": CLASSES},
    }
    lengths = IndexedCorpus(corpus[0]).document_lengths(0, 60)
    size = int(best_fit(lengths, LENGTH).max()) + 1  # all texts in each step
    made |= {"train_batch_size": size, "train_micro_batch_size_per_gpu": size}
    made["scheduler"] = {"type": "linear", "params": {"warmup_steps": 2}}
    assert run_ranks(1, train, [(made, nothing)]) == [[0]]
    found = rows(tmp_path / "run")
    start = tmp_path / "run" / "checkpoints" / "step_00000000"
    assert export_hf.main(["--checkpoint", str(start), "--output", str(tmp_path / "hf")]) == 0
    (tmp_path / "config.json").write_text(json.dumps(made))
    main = runpy.run_path(str(REPOSITORY / "tools/classify_with_transformers.py"))["main"]
    capsys.readouterr()
    arguments = ["--deepspeed_config", str(tmp_path / "config.json"), "--model", f"{tmp_path}/hf"]
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["first_loss"] == pytest.approx(found[0]["loss"], rel=1e-3)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (ours,) = [row for row in map(json.loads, lines) if "valid_accuracy" in row]
    assert line["texts"] == ours["valid_texts"] == 60
    assert (
        line["accuracy"] == pytest.approx(ours["valid_accuracy"], abs=0.1)
        and line["accuracy"] > 0.8
    )
