"""Starts ranks on this machine as processes of `python -m MODULE REQUEST`, for programs that try several layouts.

Not the launcher of training runs, which is `deepspeed` or torchrun.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megalite.config.rules import machine_has_gpu
from megalite.errors import ConfigError, MegaliteError

POLL_SECONDS = 0.05
MOST_RANKS = 1024
SHOWN_CHARACTERS = 2000  # of a failed rank's output


class RanksFailed(MegaliteError):
    """A rank exited with a code other than 0; the text has the end of its output."""


def free_port() -> int:
    """A port of this machine that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_local_ranks(world_size: int, module: str, arguments: Sequence[str]) -> None:
    """Runs `world_size` ranks until all have ended. If one fails, ends the others and raises RanksFailed."""
    port = free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        outputs = [Path(folder) / f"rank{rank}" for rank in range(world_size)]
        try:
            for rank, output in enumerate(outputs):
                env = os.environ | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                with output.open("wb") as file:
                    command = [sys.executable, "-m", module, *arguments]
                    ranks.append(
                        subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
                    )
            _wait(ranks, outputs)
        finally:
            for process in ranks:
                process.send_signal(signal.SIGKILL)
                process.wait()


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], outputs: Sequence[Path]) -> None:
    codes: list[int | None] = [None] * len(ranks)
    while None in codes:
        time.sleep(POLL_SECONDS)
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                output = outputs[rank].read_text(errors="replace").strip()[-SHOWN_CHARACTERS:]
                raise RanksFailed(f"rank {rank} of {len(ranks)} exited with {code}: {output}")


def check_room(ranks: int, name: str) -> None:
    """Raises ConfigError if this machine has GPUs but fewer than `ranks`, since each rank needs one, or if it has no
    GPU and `ranks` is above MOST_RANKS."""
    if not machine_has_gpu():
        if ranks > MOST_RANKS:
            raise ConfigError(
                f"--layouts: {name}: {ranks} ranks: must be at most {MOST_RANKS} on one machine"
            )
        return
    import torch  # imported here because reporting a mistake in a config does not need it

    if ranks > torch.accelerator.device_count():
        raise ConfigError(
            f"--layouts: {name}: needs {ranks} GPUs: this machine has {torch.accelerator.device_count()}"
        )
