"""Hundreds of forged command lines of every program: each does its work or gives a one-line error."""

import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import strategies as st

from megalite.doctor import examine as doctor
from megalite.hub.import_folder import import_hf
from megalite.inference import evaluate_program, generate_program
from megalite.prove import calibrate, ranking
from megalite.races import growth
from megalite.supervisor import restarts as supervisor
from megalite.training import pretraining as training
from tests.byte_model import save_byte_model
from tests.fuzzing import EXAMPLES, ODD, holds
from tests.programs import run_program
from tests.ranks import REPOSITORY
from tests.small_disk import small_disk
from tests.unit.data.corpora import write_corpus


class Started(Exception):
    """Raised where ranks or deepspeed would be started."""


def _prepared(prepare: Callable[[bool], Any], *_: Any) -> Any:
    prepare(True)
    raise Started


def _stop(*arguments: Any) -> Any:
    raise Started


PROGRAMS = [*sorted(REPOSITORY.glob("launcher/*.py")), *sorted(REPOSITORY.glob("tools/*.py"))]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(path: Path) -> Callable[[list[str]], int]:
    module = loaded(path)
    for work in (
        "measure",
        "tokenizing",
        "batches",
    ):  # options of benchmarks, which run for as long as they are told
        if hasattr(module, work):
            setattr(module, work, _stop)
    name = {"generate": "generate_main", "evaluate": "evaluate_main"}.get(path.stem, "main")
    return getattr(module, name)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_forged_command_line(
    path: Path, tmp_path: Path, examples: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    for module in (training, generate_program, evaluate_program):
        monkeypatch.setattr(module, "start_ranks", _prepared)
    monkeypatch.setattr(supervisor.Supervisor, "run", _stop)
    monkeypatch.setattr(doctor, "_lines", _stop)
    # These also run without arguments.
    monkeypatch.setattr(growth, "measured", _stop)
    monkeypatch.setattr(calibrate, "run_local_ranks", _stop)
    monkeypatch.setattr(ranking, "run_local_ranks", _stop)
    write_corpus(tmp_path / "corpus", 5)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.json").write_text("{}")
    main = main_of(path)
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = sorted(
        set(re.findall(r"--?[a-zA-Z][\w-]*", capsys.readouterr().out)) - {"--help", "-h"}
    )
    # Such as an error of a kernel.
    words = [word for word in ODD if isinstance(word, str) and not {"\0", "\ud800"} & {*word}]
    words += [
        "corpus",
        "text.jsonl",
        "config.json",
        ".",
        "-",
        "--",
        "-1",
        "9" * 30,
        "1.5",
        "nan",
        "1e999",
        "x=1",
    ]
    words += [
        "a,b",
        "pipe=2,data=999999999",
        "h" * 300,
        "megalite.parallel.tensor=0",
        "=",
        "a=" + "[" * 500,
    ]
    word = st.sampled_from(words) | st.sampled_from(flags or words)

    def read(arguments: list[str]) -> None:
        try:
            main(arguments)
        except SystemExit as end:
            assert end.code == 0
        except OSError as error:
            assert error.filename is not None  # run_program prints it as one line

    required = {
        "--deepspeed_config": "config.json",
        "--checkpoint": ".",
        "--input": "text.jsonl",
        "--model": ".",
    }
    start = [part for flag, value in required.items() if flag in flags for part in (flag, value)]
    lists = st.lists(word, max_size=5)
    holds(read, lists | lists.map(lambda rest: [*start, *rest]), examples, Started)


def run(program: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, program, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, timeout=120
    )


def test_unforeseen_errors_are_one_line_and_shown_on_demand(tmp_path: Path) -> None:
    """A state.json with a model that megalite cannot read, and a bug that no input causes."""
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": ""}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    words = [
        "--input",
        str(tmp_path / "text.jsonl"),
        "--tokenizer",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    ended = run_program("tools/preprocess_data.py", *words)
    assert ended.returncode == 2 and ended.stderr.startswith("preprocess_data.py: "), ended.stderr
    assert ended.stderr.count("\n") == 1 and str(tmp_path) in ended.stderr
    shown = run_program("tools/preprocess_data.py", *words, MEGALITE_TRACEBACK="1")
    assert (
        shown.returncode == 2
        and "Traceback" in shown.stderr
        and shown.stderr.endswith(ended.stderr)
    )


def test_inputs_that_once_gave_a_traceback(tmp_path: Path) -> None:
    config = str(tmp_path / "config.json")
    Path(config).write_text((REPOSITORY / "ds_configs/tiny_cpu.json").read_text())
    train = ["--deepspeed_config", config]
    for program, words, environment, said in (
        (
            "launcher/pretrain.py",
            train,
            {"RANK": "8", "WORLD_SIZE": "8"},
            "RANK: 8: must be below WORLD_SIZE 8",
        ),
        ("launcher/pretrain.py", train, {"RANK": "x"}, "RANK: 'x': must be an integer"),
        (
            "tools/benchmark_step.py",
            ["--deepspeed_config", config, "--layouts", ""],
            {},
            "--layouts: ",
        ),
        ("tools/inspect_checkpoint.py", ["h" * 5000], {}, "File name too long"),
    ):
        ended = run_program(program, *words, **environment)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and said in ended.stderr, (
            ended
        )


def test_an_imported_checkpoint_is_inspected(tmp_path: Path) -> None:
    import_hf(save_byte_model(tmp_path / "model"), tmp_path / "checkpoint", verify=False)
    ended = run_program("tools/inspect_checkpoint.py", str(tmp_path / "checkpoint"), "--verify")
    assert ended.returncode == 0 and "written by" not in ended.stdout, ended.stderr


def test_names_that_are_not_text_or_not_files(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    ended = run("tools/collect_sources.py", "--output", odd)
    assert ended.returncode == 0, ended.stderr
    for output in ("h" * 300, str(tmp_path / "file" / "x")):
        (tmp_path / "file").touch()
        ended = run("tools/collect_sources.py", "--output", output)
        assert ended.returncode == 2 and ended.stderr.count(b"\n") == 1, ended.stderr


def test_a_full_disk_is_one_line_and_not_a_mistake(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        ended = run("tools/collect_sources.py", "--output", str(disk))
        assert (
            ended.returncode == 1
            and ended.stderr == b"collect_sources.py: a file: No space left on device\n"
        ), ended
        assert list(disk.iterdir()) == []
