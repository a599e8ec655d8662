"""Settings of all tests: the CPU, one thread per process, no network.

They are set before any test module imports torch, and programs started by tests inherit them.
"""

import gc
import os
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402  (after the settings)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="also run the long forms: hours, not minutes"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    spread_launches(items)
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long form: --long runs it"))


def spread_launches(items: list[pytest.Item]) -> None:
    """Spreads the files of tests/launch, which wait more than they compute, evenly among those of tests/distributed, so
    that the other worker uses the cores meanwhile. The short files of tests/unit stay at the end."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)

    def place(file: Path) -> float:
        beside = folders[file.parent]
        early = file.parent.name in ("launch", "distributed")
        return beside.index(file) / len(beside) if early else 1.0

    items[:] = [item for file in sorted(files, key=place) for item in files[file]]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freezes everything imported so far, so that the garbage collector does not scan it again in each test."""
    gc.collect()
    gc.freeze()
