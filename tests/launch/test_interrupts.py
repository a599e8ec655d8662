"""Ctrl-C in any phase of any program is one line that says what to do next, and exit code 130.

A phase begins when the program imports a module, opens a file or starts a process: Python's audit events say so, from
inside the program, which then interrupts its whole group as a terminal does.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.hub.import_folder import import_hf
from tests.byte_model import save_byte_model
from tests.launch.starts import checkpoints, rows, write_config
from tests.ranks import REPOSITORY
from tests.unit.data.corpora import write_corpus

HARNESS = """
import os, runpy, signal, sys, threading
event, end, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
sys.argv = sys.argv[4:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
def hear(name, arguments, met=[]):
    if name == event and not met and str(arguments[0]).endswith(end):
        met.append(name)
        if seconds:
            threading.Timer(seconds, os.killpg, (0, signal.SIGINT)).start()
        else:
            os.killpg(0, signal.SIGINT)
sys.addaudithook(hear)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AGAIN, RESUME = "run the same command again", "run the same command again to resume"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of whatever a program reads."""
    made = tmp_path_factory.mktemp("interrupts")
    save_byte_model(made / "model")
    import_hf(made / "model", made / "checkpoint", verify=False)
    write_corpus(made / "corpus", 400, vocabulary=131)
    lines = '{"text": "one two three four five six seven"}\n' * 20_000
    (made / "text.jsonl").write_text(lines)
    chance = random.Random(0)
    words = (
        ["".join(chance.choices("abcdefghijk", k=chance.randint(1, 9))) for _ in range(50)]
        for _ in range(20_000)
    )
    (made / "words.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words)
    )
    write_config(made, steps=10_000)
    return made


def interrupted(
    folder: Path, phase: tuple[str, str, float], program: str, *words: str
) -> tuple[int, str, str]:
    """The exit code, what was said on standard error, and on standard output."""
    command = [sys.executable, "-c", HARNESS, *map(str, phase), str(REPOSITORY / program), *words]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors, said


CONFIG, PRETRAIN = ("--deepspeed_config", "config.json"), str(REPOSITORY / "launcher/pretrain.py")
PREPROCESS = (
    "tools/preprocess_data.py",
    "--input",
    "text.jsonl",
    "--tokenizer",
    "model",
    "--output",
    "OUT/x",
)
PHASES: dict[str, tuple[tuple[str, str, float], tuple[str, ...], str]] = {
    "pretrain: imports": (("import", "pydantic", 0), ("launcher/pretrain.py", *CONFIG), AGAIN),
    "pretrain --check: corpus": (("open", "corpus.bin", 0), ("launcher/pretrain.py", *CONFIG, "--check"), RESUME),
    "pretrain: before ranks": (("open", "corpus.idx", 0), ("launcher/pretrain.py", *CONFIG), AGAIN),
    "generate: weights": (
        ("open", "tensors_00000.safetensors", 0),
        ("launcher/generate.py", "--checkpoint", "checkpoint", "--prompt", "a"), AGAIN,
    ),
    "preprocess: workers": (
        ("import", "multiprocessing.popen_spawn_posix", 0.3), (*PREPROCESS, "--workers", "2"), RESUME),
    "train_tokenizer: training": (  # in C++, for minutes
        ("open", "words.jsonl", 2.0),
        ("tools/train_tokenizer.py", "--input", "words.jsonl", "--vocab-size", "8000", "--model-type", "unigram",
         "--output", "OUT/t"), AGAIN,
    ),
    "import: reading": (
        ("open", "generation_config.json", 0), ("tools/import_hf.py", "--model", "model", "--output", "OUT/c"), AGAIN),
    "verify_layouts: ranks": (
        ("subprocess.Popen", "python", 1.0),
        ("tools/verify_layouts.py", *CONFIG, "--layouts", "data=2", "--set", "megalite.train.steps=4"), AGAIN,
    ),
    "run: guards": (
        ("subprocess.Popen", "env", 0), ("launcher/run.py", "--num_gpus", "1", PRETRAIN, *CONFIG), RESUME),
}  # fmt: skip
MORE_PHASES: dict[str, tuple[tuple[str, str, float], tuple[str, ...], str]] = {
    "pretrain: torch": (("import", "torch", 0), ("launcher/pretrain.py", *CONFIG), AGAIN),
    "pretrain: engine": (("import", "deepspeed.runtime.engine", 0), ("launcher/pretrain.py", *CONFIG), AGAIN),
    "pretrain --check: config": (("open", "config.json", 0), ("launcher/pretrain.py", *CONFIG, "--check"), RESUME),
    "generate: imports": (("import", "transformers", 0), ("launcher/generate.py", "--checkpoint", "model"), AGAIN),
    "evaluate: corpus": (
        ("open", "corpus.bin", 0), ("launcher/evaluate.py", "--checkpoint", "checkpoint", "--data", "corpus"), AGAIN),
    "preprocess: imports": (("import", "numpy", 0), PREPROCESS, AGAIN),
    "preprocess: reading": (("open", "text.jsonl", 0.1), PREPROCESS, RESUME),
    "export: settings": (
        ("open", "unfinished/config.json", 0),
        ("tools/export_hf.py", "--checkpoint", "checkpoint", "--output", "OUT/e"), AGAIN,
    ),
    "inspect_checkpoint": (
        ("open", "index.json", 0), ("tools/inspect_checkpoint.py", "checkpoint", "--verify"), AGAIN),
    "inspect_data": (("open", "corpus.bin", 0), ("tools/inspect_data.py", "corpus"), AGAIN),
    "merge_data": (
        ("open", "m.bin.partial", 0), ("tools/merge_data.py", "--input", "corpus", "--output", "OUT/m"), AGAIN),
    "benchmark_step: ranks": (
        ("subprocess.Popen", "python", 1.0), ("tools/benchmark_step.py", *CONFIG, "--layouts", "data=2"), AGAIN),
    "doctor: collectives": (("subprocess.Popen", "python", 3.0), ("tools/doctor.py", "--num_gpus", "2"), AGAIN),
    "run: ranks": (
        ("subprocess.Popen", "python", 3.0),
        ("launcher/run.py", "--num_gpus", "2", PRETRAIN, *CONFIG), RESUME,
    ),
}  # fmt: skip
LONG = [pytest.param(name, marks=pytest.mark.long) for name in MORE_PHASES]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [*PHASES, *LONG])
def test_ctrl_c_is_one_line(folder: Path, name: str) -> None:
    phase, (program, *words), what_next = (PHASES | MORE_PHASES)[name]
    out = folder / f"out {name}"
    code, errors, said = interrupted(
        folder, phase, program, *(word.replace("OUT", str(out)) for word in words)
    )
    assert code == 130, (code, errors, said)
    assert errors.splitlines() == [f"{Path(program).name}: interrupted: {what_next}"], errors
    assert "Traceback" not in said
    assert {path.name for path in out.glob("*")} <= {"x.partial"}, "what is not whole has no name"


@pytest.mark.timeout(240)
def test_a_run_that_was_interrupted_resumes(folder: Path) -> None:
    words, run = ("launcher/pretrain.py", *CONFIG), folder / "run"
    for _ in range(2):
        before = len(rows(run))
        code, errors, said = interrupted(folder, ("open", "metrics.jsonl", 1.0), *words)
        step = rows(run)[-1]["step"]
        assert (code, errors) == (130, ""), errors
        assert f"stopped by signal 2 after step {step}: {RESUME}" in said, said
        assert checkpoints(run)[-1] == step > before
