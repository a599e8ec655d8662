"""A schedule is added in one place: with GPipe in SCHEDULES and nothing else changed, it trains, and dry run and
planner know it.

Python imports the file sitecustomize.py at its start, also in the ranks that a program starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY
from tests.small_models import MODELS, VOCABULARY
from tests.unit.data.corpora import write_corpus

GPIPE = '''
from megalite.programs import schedules
from megalite.programs.program import Action, Program


def gpipe(p, m):
    """All forwards, then all backwards (arXiv 1811.06965)."""
    actions = [
        (*(Action("F", rank, k) for k in range(m)), *(Action("B", rank, k) for k in range(m)))
        for rank in range(p)
    ]
    return Program(schedules.straight(p), m, tuple(actions))


schedules.SCHEDULES["gpipe"] = schedules.PipelineSchedule(
    about="all forwards, then all backwards",
    home=lambda p, v: schedules.straight(p),
    program=lambda p, m, v, cost: gpipe(p, m),
    bubble=lambda p, m, v: ("(p - 1) / (m + p - 1)", (p - 1) / (m + p - 1)),
)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sitecustomize.py, a corpus and a config."""
    path = tmp_path_factory.mktemp("gpipe")
    (path / "sitecustomize.py").write_text(GPIPE)
    write_corpus(path / "train", documents=40, vocabulary=VOCABULARY)
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2},
        "megalite": {
            "model": {**MODELS["llama"], "num_hidden_layers": 2, "tie_word_embeddings": True},
            "parallel": {"pipe": 2, "schedule": "gpipe"},
            "data": {"sequence_length": 12, "train": [str(path / "train")]},
            "train": {"steps": 10, "run_dir": str(path / "run")},
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def command(folder: Path, *words: str) -> str:
    """The output of `python WORDS`, which must succeed."""
    environment = os.environ | {"PYTHONPATH": f"{folder}:{REPOSITORY}"}
    config = [] if words[0] == "-c" else ["--deepspeed_config", str(folder / "config.json")]
    done = subprocess.run(
        [sys.executable, *words, *config],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layouts_with_it_agree_with_one_process(folder: Path) -> None:
    layout = "pipe=2,zero=2,micro=2,schedule=gpipe"
    words = "tools/verify_layouts.py", "--steps", "1", "--layouts", layout
    assert command(folder, *words).endswith("agrees\n")


def test_the_dry_run_and_the_planner_know_it(folder: Path) -> None:
    """In one process, whose start takes longest."""
    config = f"'--deepspeed_config', {str(folder / 'config.json')!r}, '--world-size', '2'"
    program = (
        "from megalite.prove import dry_run_program; from megalite.plan import plan_program;"
        f"dry_run_program.main([{config}, '--messages']);"
        f"plan_program.main([{config}, '--device', 'A100', '--json'])"
    )
    shown = command(folder, "-c", program)
    assert "schedule gpipe: complete, and its 8 messages per step cannot hang" in shown
    assert "gpipe" in shown[shown.index("{") :], "among the planner's layouts"


def test_its_program_holds_all_micro_batches(folder: Path) -> None:
    """The rank's memory, and the formula of its bubble, are those of the program."""
    program = (
        "from megalite.programs.check import check; from megalite.programs.schedules import *;"
        "found = check(make_program('gpipe', 4, 8, 1));"
        "print(found.held, found.bubble == SCHEDULES['gpipe'].bubble(4, 8, 1)[1])"
    )
    assert command(folder, "-c", program).split("\n")[0] == "(8, 8, 8, 8) True"
