"""`megalite`: its table, help, typos, completion and example configs."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megalite
from megalite.commands import completion, configs
from megalite.commands.main import unknown_command, usage
from megalite.commands.table import COMMANDS, Command
from megalite.errors import ConfigError
from tests.ranks import REPOSITORY

NAMES = [command.name for command in COMMANDS]
HELP = """
import sys, runpy
sys.argv = ["megalite", "--help"]
try:
    runpy.run_module("megalite", run_name="__main__")
except SystemExit as end:
    slow = {"torch", "deepspeed", "transformers", "numpy", "pydantic", "rich"} & sys.modules.keys()
    sys.exit(f"imports {slow}" if slow else end.code)
"""


def megalite_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megalite", *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )  # fmt: skip


def test_help_lists_every_command_at_once_and_imports_nothing_slow() -> None:
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60
        )
        seconds.append(time.monotonic() - start)
        assert done.returncode == 0 and done.stdout.strip() == usage(), done.stderr
    assert min(seconds) < 1.0  # measured: 0.12 s
    assert all(re.search(rf"^  {name} +\w", usage(), re.MULTILINE) for name in NAMES)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_program(command: Command) -> None:
    found = importlib.util.find_spec(command.module)
    assert found is not None and found.origin is not None
    functions = {
        node.name
        for node in ast.parse(Path(found.origin).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert command.function in functions and len(command.phrase) < 80


def test_names_are_those_that_scripts_rely_on() -> None:
    promised = {
        "pretrain", "preprocess", "train-tokenizer", "import", "export", "generate", "chat", "evaluate",
        "verify-layouts", "inspect-data", "inspect-checkpoint", "doctor", "run", "plan", "report", "dry-run",
    }  # fmt: skip
    assert promised <= set(NAMES) and len(set(NAMES)) == len(NAMES)


def test_a_typo_names_the_nearest_command_and_ends_with_2() -> None:
    done = megalite_command("pretrian", "--deepspeed_config", "x")
    line = "megalite: 'pretrian': unknown command; did you mean pretrain? (megalite --help lists them)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert "did you mean" not in unknown_command("qqqq")
    assert megalite_command().returncode == 2


def test_version_is_the_packages() -> None:
    assert megalite_command("--version").stdout == f"megalite {megalite.__version__}\n"


def test_a_commands_help_and_mistakes_begin_with_its_name() -> None:
    done = megalite_command("configs", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: megalite configs ")
    done = megalite_command("configs", "tiny_cpus")
    assert done.returncode == 2
    assert done.stderr == (
        "megalite configs: tiny_cpus: no such example config; did you mean tiny_cpu?\n"
    )


def test_importing_the_package_is_light() -> None:
    code = "import sys, megalite; megalite.load; sys.exit('torch' not in sys.modules)"
    light = "import sys, megalite; dir(megalite); sys.exit('torch' in sys.modules)"
    for program in (light, code):
        assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        megalite.lod  # noqa: B018


def completed(words: list[str]) -> list[str]:
    """The completions that bash would offer for the last word."""
    script = f"""{completion.bash()}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
_megalite; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_and_subcommands() -> None:
    assert completed(["megalite", "pre"]) == ["pretrain", "preprocess"]
    assert completed(["megalite", "config", "e"]) == ["explain"]
    assert completed(["megalite", "completion", ""]) == list(completion.SHELLS)
    assert completed(["megalite", "pretrain", ""]) == []  # then bash offers files
    assert "--version" in completed(["megalite", "--"])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_command(shell: str) -> None:
    text = {"zsh": completion.zsh, "fish": completion.fish}[shell]()
    for command in COMMANDS:
        assert f"{command.name}:{command.phrase}" in text or (
            f'-a {command.name} -d "{command.phrase}"' in text
        )
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_examples_are_listed_printed_and_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs.main([])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")}
    configs.main(["tiny_cpu.json"])
    text = (REPOSITORY / "ds_configs/tiny_cpu.json").read_text()
    assert capsys.readouterr().out == text
    configs.main(["tiny_cpu", str(tmp_path / "my.json")])
    assert (tmp_path / "my.json").read_text() == text
    with pytest.raises(ConfigError, match="already exists; choose a new file"):
        configs.main(["tiny_cpu", str(tmp_path / "my.json")])
