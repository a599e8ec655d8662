"""The README's "Train" from a fresh clone, word by word, on a small corpus."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch.starts import BIN, rows
from tests.ranks import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
FEWER = [
    "megalite.train.steps=3",
    "scheduler.params.warmup_steps=0",
    "megalite.train.eval_interval=3",
]


def commands(heading: str) -> list[list[str]]:
    """The commands of the code block under a heading, as words."""
    section = README.split(f"\n### {heading}\n")[1].split("\n#")[0]
    block = re.findall(r"^    (.*)$", section, re.MULTILINE)
    lines = "\n".join(block).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if found]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would check out, with a command `megalite` in bin/ as an installation makes it."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        source, copy = REPOSITORY / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        elif source.is_file():
            copy.write_bytes(source.read_bytes())
    (folder / "bin").mkdir()
    (folder / "bin/megalite").write_text(f'#!/bin/sh\nexec {sys.executable} -m megalite "$@"\n')
    (folder / "bin/megalite").chmod(0o755)
    return folder


def run(clone: Path, words: list[str]) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(clone),
        "PATH": f"{clone}/bin:{BIN}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        words, cwd=clone, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def library(files: int) -> list[str]:
    """Some sources of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(errors="replace") for path in sorted(folder.glob("*.py"))[:files]]


def write_corpus(folder: Path, files: int) -> None:
    """In place of tools/collect_sources.py, which takes all of the library."""
    folder.mkdir()
    texts = library(files)
    for name, part in (("train", texts[2:]), ("valid", texts[:2])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines)


def test_the_environments_commands_exist() -> None:
    quickstart, activate = commands("The environment")
    assert quickstart == ["bash", "launcher/quickstart.sh"]
    assert (REPOSITORY / quickstart[1]).is_file()
    assert activate == ["source", ".venv/bin/activate"]
    assert ".venv/bin/python" in (REPOSITORY / "tools/environment.sh").read_text()


def test_from_a_text(clone: Path) -> None:
    (clone / "my.txt").write_text("\n".join(library(12)))
    pretrain, generate = commands("From a text, on a laptop")
    run(clone, [*pretrain, *FEWER])
    lines = run(clone, generate).splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(2, id="two ranks"), pytest.param(8, id="as written", marks=pytest.mark.long)],
)
def test_step_by_step(clone: Path, ranks: int) -> None:
    collect, *steps, check, train = commands("Step by step")
    assert collect == ["python", "tools/collect_sources.py", "--output", "data"]
    if not (clone / "data").exists():
        write_corpus(clone / "data", 40)
        for words in steps:
            run(clone, words)
    resolved = json.loads(run(clone, check))
    assert resolved["megalite"]["parallel"]["tensor"] == 2
    position = train.index("--num_gpus") + 1
    assert train[position] == "8"
    train[position] = str(ranks)
    fewer = [] if ranks == 8 else ["megalite.parallel.pipe=1"]
    run(clone, [*train, *FEWER, *fewer, f"megalite.train.run_dir=runs/{ranks}"])
    assert [row["step"] for row in rows(clone / f"runs/{ranks}") if "loss" in row] == [1, 2, 3]
    assert "valid_loss" in rows(clone / f"runs/{ranks}")[-1]


@pytest.mark.parametrize("words", commands("GPUs and clusters"), ids=shlex.join)
def test_commands_for_gpus_name_what_exists(words: list[str]) -> None:
    program = next(word for word in words if "pretrain" in word or word == "doctor")
    assert program in ("pretrain", "doctor") or (REPOSITORY / program).is_file()
    config = words[words.index("--deepspeed_config") + 1]
    assert (REPOSITORY / config).is_file()
