"""launcher/generate.py and launcher/evaluate.py under the real `deepspeed` and alone, tools/ as programs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megalite.data.indexed import token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.hub.import_folder import import_hf
from tests.byte_model import save_byte_model
from tests.families import VOCABULARY
from tests.programs import run_program
from tests.ranks import REPOSITORY

TENSOR, PIPE = "megalite.parallel.tensor=2", "megalite.parallel.pipe=2"
PROMPT = "bcd"
GENERATE = "launcher/generate.py"


def launch(program: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["deepspeed", "--num_gpus", "2", f"launcher/{program}.py", *arguments]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        input=stdin,
    )


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
    arguments = ["--max-new-tokens", "9", PIPE]
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
        PIPE,
    ]
    found = json_lines(launch("evaluate", *arguments, "--sequence-length", "10"))
    windows = ids.unfold(0, 11, 10)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert len(found) == 1 and found[0]["tokens"] == 100
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


def test_a_prompt_from_standard_input_and_several_samples(folder: Path, tmp_path: Path) -> None:
    """On two ranks as on one; the first sample is that of a single one."""
    options = ["--checkpoint", str(folder), "--max-new-tokens", "6", "--temperature", "1.0"]
    options += ["--min-p", "0.01", "--repetition-penalty", "1.2"]
    prompt = "bc\nd\n"
    several = ["--samples", "3", "--prompt", "-", TENSOR]
    lines = json_lines(launch("generate", *options, *several, stdin=prompt))
    assert [(line["prompt"], line["sample"]) for line in lines] == [(prompt, i) for i in range(3)]
    assert len({line["text"] for line in lines}) > 1
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (prompt, "x y")))
    found = json_lines(run_program(GENERATE, *options, "--prompts", str(prompts)))
    assert [line["prompt"] for line in found] == [prompt, "x y"] and "sample" not in found[0]
    assert found[0]["text"] == lines[0]["text"]
    assert json_lines(run_program(GENERATE, *options, "--prompt", prompt))[0] == found[0]


@pytest.mark.parametrize(
    ("words", "stdin", "line"),
    [
        (["--prompt", "-"], "", "--prompt: -: standard input is empty: must hold the prompt"),
        (["--prompt", "a", "--samples", "2"], "", "--samples: 2: needs --temperature above 0"),
        (["--prompts", "p.jsonl"], "", 'p.jsonl:1: must be an object with a text as its "prompt"'),
    ],
)
def test_prompts_that_are_none_are_one_line(
    folder: Path, tmp_path: Path, words: list[str], stdin: str, line: str
) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    words = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in words]
    done = run_program(GENERATE, "--checkpoint", str(folder), *words, stdin=stdin)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert line in done.stderr


def test_mistakes_are_one_line_and_exit_2(folder: Path, tmp_path: Path) -> None:
    done = launch(
        "generate",
        "--checkpoint",
        str(folder),
        "--prompt",
        "a",
        "megalite.parallel.tensro=2",
    )
    assert done.returncode == 2
    line = (
        "generate.py: megalite.parallel.tensro: unknown key; did you mean megalite.parallel.tensor?"
    )
    assert error_lines(done) == [line]
    (tmp_path / "stands").mkdir()
    arguments = ["--model", str(folder), "--output", str(tmp_path / "stands")]
    done = run_program("tools/import_hf.py", *arguments)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "already exists" in done.stderr
    )


def test_tools_convert_and_say_what_they_compared(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder), "--output", str(tmp_path / "in")]
    done = run_program("tools/import_hf.py", *arguments)
    assert done.returncode == 0 and "maximum difference" in done.stdout, done.stderr
    arguments = [
        "--checkpoint",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
        "--dtype",
        "bfloat16",
    ]
    done = run_program("tools/export_hf.py", *arguments)
    assert done.returncode == 0 and "maximum difference" in done.stdout, done.stderr
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").decode([40, 41]) != ""
