"""Ranks as processes of this machine (megalite/ranks/local.py): how they end, and how many there may be."""

import time
from pathlib import Path

import pytest
import torch

from megalite.errors import ConfigError
from megalite.ranks import local
from megalite.ranks.local import RanksFailed, check_room, run_local_ranks

RANK = """
import os, sys, time
from pathlib import Path
here = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
Path(sys.argv[1], f"rank{here['RANK']}").write_text(repr((here, int(os.environ["MASTER_PORT"]))))
if sys.argv[2:] == [here["RANK"]]:
    sys.exit("x" * 3000 + " the last words")
if sys.argv[2:]:
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that a rank can run."""
    (tmp_path / "a_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_each_rank_gets_its_place(folder: Path) -> None:
    run_local_ranks(3, "a_rank", [str(folder)])
    told = [eval((folder / f"rank{rank}").read_text()) for rank in range(3)]
    assert [here for here, _ in told] == [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
        }
        for rank in range(3)
    ]  # fmt: skip
    assert len({port for _, port in told}) == 1


def test_the_first_rank_that_fails_ends_the_others_and_is_reported(folder: Path) -> None:
    start = time.monotonic()
    with pytest.raises(
        RanksFailed, match=r"^rank 1 of 3 exited with 1: x+ the last words$"
    ) as raised:
        run_local_ranks(3, "a_rank", [str(folder), "1"])
    assert time.monotonic() - start < 30, "the others would sleep for a minute"
    assert len(str(raised.value)) < 2100


def test_a_rank_uses_a_gpu_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "machine_has_gpu", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    check_room(4, "tensor=4")
    with pytest.raises(
        ConfigError, match="^--layouts: tensor=5: needs 5 GPUs: this machine has 4$"
    ):
        check_room(5, "tensor=5")
    monkeypatch.setattr(local, "machine_has_gpu", lambda: False)
    check_room(1024, "pipe=1024")
    with pytest.raises(
        ConfigError, match="^--layouts: pipe=2048: 2048 ranks: must be at most 1024"
    ):
        check_room(2048, "pipe=2048")
