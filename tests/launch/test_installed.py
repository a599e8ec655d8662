"""An installed wheel is whole: it trains, generates and lists its examples far from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch.starts import BIN, rows, write_config
from tests.ranks import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "megalite", "ds_configs", "pyproject.toml", "README.md",
         "LICENSE"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_symlink():
            copy.symlink_to(os.readlink(REPOSITORY / name))
        elif (REPOSITORY / name).exists():
            copy.write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], check=True
    )  # fmt: skip
    return next(folder.glob("megalite-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who installed the wheel, without a way to the checkout."""
    target = tmp_path_factory.mktemp("target")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-deps",
    ]
    subprocess.run([*command, "--target", target, wheel], check=True)
    return {
        **os.environ,
        "PYTHONPATH": str(target),
        "PATH": f"{target}/bin:{BIN}:{os.environ['PATH']}",
    }


def run(environment: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_wheel_holds_examples_types_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert {f"megalite/ds_configs/{p.name}" for p in (REPOSITORY / "ds_configs").glob("*")} <= names
    assert "megalite/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)
    assert not any(name.startswith(("tests/", "launcher/", "tools/")) for name in names)
    for field in (
        "License-Expression: Apache-2.0", "Classifier: Typing :: Typed", "Author: ", "Summary: ", "Keywords: ",
        "Requires-Python: >=3.11", "Description-Content-Type: text/markdown", "Provides-Extra: docs",
    ):  # fmt: skip
        assert f"\n{field}" in metadata, field
    assert "\n# megalite\n" in metadata


def test_it_works_without_the_checkout(installed: dict[str, str], tmp_path: Path) -> None:
    where = run(
        installed, tmp_path, sys.executable, "-c", "import megalite; print(megalite.__file__)"
    )
    assert where.stdout.startswith(installed["PYTHONPATH"])
    assert run(installed, tmp_path, "megalite", "--version").stdout.startswith("megalite ")
    assert "tiny_cpu" in run(installed, tmp_path, "megalite", "configs").stdout
    run(installed, tmp_path, "megalite", "configs", "tiny_cpu", "my.json")
    assert json.loads((tmp_path / "my.json").read_text())["megalite"]["parallel"]["pipe"] == 2


def test_run_starts_ranks_on_a_command(installed: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    words = ["pretrain", "--deepspeed_config", str(config), "megalite.parallel.tensor=2"]
    run(installed, tmp_path, "megalite", "run", "--num_gpus", "2", *words)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    first = rows(tmp_path / "run")[0]
    assert len(first["weights_bytes"]) == 2


def test_a_mistake_under_run_names_the_command(installed: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    words = ["pretrain", "--deepspeed_config", str(config), "megalite.parallel.tensro=2"]
    done = subprocess.run(
        ["megalite", "run", "--num_gpus", "2", *words],
        cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "tensro" in line and ": unknown" in line]
    assert done.returncode == 2
    known = "unknown key; did you mean megalite.parallel.tensor?"
    assert lines == [f"megalite pretrain: megalite.parallel.tensro: {known}"]
