"""A user's mistake under a launcher: one line of ours, no traceback, exit code 2."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.starts import Start, write_config
from tests.programs import run_program


def write_bad_corpus(folder: Path) -> str:
    (folder / "bad.idx").write_bytes(b"MMIDIDX\x00\x00" + b"\x07" * 40)
    (folder / "bad.bin").write_bytes(b"\x00" * 64)
    return str(folder / "bad")


@pytest.mark.timeout(200)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, start: Callable[..., Start]) -> None:
    config = str(write_config(tmp_path))
    cases = {
        "megalite.train.stepz": [f"--deepspeed_config={config}", "megalite.train.stepz=3"],
        "bad.idx": [
            f"--deepspeed_config={config}",
            f'megalite.data.train=["{write_bad_corpus(tmp_path)}"]',
        ],
    }
    # All at once: a start waits more than it computes.
    starts = {said: start(tmp_path, *arguments) for said, arguments in cases.items()}
    under_torchrun = start(
        tmp_path, f"--deepspeed_config={config}", "megalite.parallel.pipe=3", launcher="torchrun"
    )
    for said, one in starts.items():
        assert one.wait() == 2, one.text
        assert len(one.lines) == 1 and said in one.lines[0], one.text
        assert "Traceback" not in one.text
    assert under_torchrun.wait() == 1, under_torchrun.text
    assert len(under_torchrun.lines) == 1 and "megalite.parallel" in under_torchrun.lines[0], (
        under_torchrun.text
    )
    assert not (tmp_path / "run").exists()


def test_a_port_that_another_run_has_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in world.items():
            monkeypatch.setenv(name, value)
        ended = run_program("launcher/pretrain.py", "--deepspeed_config", str(config))
    assert ended.returncode == 2, ended.stderr
    assert [
        line for line in ended.stderr.splitlines() if f"MASTER_PORT: {port}: " in line
    ] == ended.stderr.splitlines()


def test_check_makes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    ended = run_program("launcher/pretrain.py", "--deepspeed_config", str(config), "--check")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["megalite"]["train"]["run_dir"] == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()
