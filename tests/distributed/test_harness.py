"""lm-evaluation-harness on a layout, and its own command on the export: the same figures, from local files.

It is the extra `eval`, 0.5 GB; EVAL=1 bash tools/test.sh installs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megalite.hub.export_folder import export_hf
from megalite.hub.import_folder import import_hf
from tests.byte_model import save_byte_model
from tests.distributed.test_evaluate import evaluated
from tests.ranks import RankFailure, run_ranks

try:
    import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]

    INSTALLED = True
except ImportError:
    INSTALLED = False
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "an",
    "old",
    "red",
    "hat",
    "in",
    "far",
    "away",
    "lands",
]
SETTINGS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["cat", "old hat", "mat"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["~", "\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks that read one local file: texts shorter and longer than the model's positions."""
    rows = [
        {
            "text": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 9] * (1 + i % 4)),
            "label": i % 3,
            "answer": "7Y7Y7Y",
        }
        for i in range(17)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, keys in SETTINGS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        }
        task = {"task": name, "test_split": "test", **data, **keys}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path / "tasks"


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed: the extra `eval`")
def test_a_layout_gives_what_lm_eval_gives_on_the_export(tasks: Path, tmp_path: Path) -> None:
    import_hf(save_byte_model(tmp_path / "hf"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
    ]
    command += [
        f"pretrained={tmp_path / 'out'}",
        "--tasks",
        ",".join(SETTINGS),
        "--include_path",
        str(tasks),
    ]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "results.json")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("results_*.json")
    wanted = json.loads(file.read_text())["results"]

    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--tasks", ",".join(SETTINGS)]
    arguments += ["--include-path", str(tasks), "megalite.parallel.pipe=2"]
    found: dict[str, Any] = {
        line["task"]: line for line in run_ranks(4, evaluated, arguments, init=False)[0]
    }
    assert found.keys() == wanted.keys() == SETTINGS.keys()
    for name, settings in SETTINGS.items():
        for metric in settings["metric_list"]:
            key = f"{metric['metric']},none"
            assert found[name][key] == pytest.approx(wanted[name][key], rel=1e-5), (name, key)

    with pytest.raises(RankFailure, match=r"exit code 2(.|\n)*--tasks: chioce: no such task"):
        run_ranks(
            1, evaluated, ["--checkpoint", str(tmp_path / "hf"), "--tasks", "chioce"], init=False
        )


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_one_line_says_what_to_install(tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(save_byte_model(tmp_path / "hf")), "--tasks", "choice"]
    with pytest.raises(
        RankFailure, match=r"exit code 2(.|\n)*needs lm-eval: pip install 'megalite\[eval\]'"
    ):
        run_ranks(1, evaluated, arguments, init=False)
