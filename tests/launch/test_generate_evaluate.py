"""launcher/generate.py and launcher/evaluate.py under the real `deepspeed`, tools/ as programs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.hub.import_hf import import_hf
from tests.byte_model import save_byte_model
from tests.families import VOCABULARY
from tests.ranks import REPOSITORY

LAYOUT = ["megalite.parallel.tensor=2", "megalite.parallel.pipe=2"]
PROMPT = "bcd"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200
    )


def launch(program: str, *arguments: str, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    return run("deepspeed", "--num_gpus", str(ranks), f"launcher/{program}.py", *arguments)


def json_lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [
        line
        for line in done.stderr.splitlines()
        if line.startswith(("generate.py:", "import_hf.py:"))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("launch") / "hf")


def test_generation_and_evaluation_of_a_checkpoint_and_of_a_folder(
    folder: Path, tmp_path: Path
) -> None:
    import_hf(folder, tmp_path / "checkpoint")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\nx y z w\n")
    arguments = ["--max-new-tokens", "9", *LAYOUT]
    lines = json_lines(
        launch("generate", "--checkpoint", str(folder), "--prompts", str(prompts), *arguments)
    )
    assert [line["prompt"] for line in lines] == [PROMPT, "x y z w"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for line in lines:
        ids = tokenizer(line["prompt"], return_tensors="pt", return_token_type_ids=False)
        whole = model.generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        assert line["text"] == tokenizer.decode(
            whole[ids["input_ids"].shape[1] :], skip_special_tokens=True
        )

    ids = torch.randint(0, VOCABULARY, (101,), generator=torch.Generator().manual_seed(0))
    with IndexedWriter(tmp_path / "corpus", token_dtype(VOCABULARY)) as writer:
        writer.add_document(ids.numpy())
    arguments = [
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--data",
        str(tmp_path / "corpus"),
        LAYOUT[1],
    ]
    found = json_lines(launch("evaluate", *arguments, "--sequence-length", "10", ranks=2))
    windows = ids.unfold(0, 11, 10)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert len(found) == 1 and found[0]["tokens"] == 100
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


def test_mistakes_are_one_line_and_exit_2(folder: Path, tmp_path: Path) -> None:
    done = launch(
        "generate",
        "--checkpoint",
        str(folder),
        "--prompt",
        "a",
        "megalite.parallel.tensro=2",
        ranks=2,
    )
    assert done.returncode == 2
    line = (
        "generate.py: megalite.parallel.tensro: unknown key; did you mean megalite.parallel.tensor?"
    )
    assert error_lines(done) == [line]
    (tmp_path / "stands").mkdir()
    done = run(
        sys.executable,
        "tools/import_hf.py",
        "--model",
        str(folder),
        "--output",
        str(tmp_path / "stands"),
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "already exists" in done.stderr
    )


def test_tools_convert_and_say_what_they_compared(folder: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable,
        "tools/import_hf.py",
        "--model",
        str(folder),
        "--output",
        str(tmp_path / "in"),
    )
    assert done.returncode == 0 and "maximum difference" in done.stdout, done.stderr
    arguments = [
        "--checkpoint",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
        "--dtype",
        "bfloat16",
    ]
    done = run(sys.executable, "tools/export_hf.py", *arguments)
    assert done.returncode == 0 and "maximum difference" in done.stdout, done.stderr
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").decode([40, 41]) != ""
