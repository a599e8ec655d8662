"""Starts training as a user does, with the real `deepspeed`, and watches every process of it from outside."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.launch.hosts import Host
from tests.ranks import REPOSITORY, run_ranks
from tests.training_runs import nothing, train
from tests.unit.data.corpora import write_corpus

BIN = Path(sys.executable).parent
VOCABULARY = 131
START_SECONDS = 90.0  # two cores may be shared


def write_config(folder: Path, **train: Any) -> Path:
    """A corpus of random tokens and a config of a small model whose steps take some 50 ms."""
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus", 400, vocabulary=VOCABULARY)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
        "megalite": {
            "model": {
                "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 52,
                "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64,
            },
            "data": {"sequence_length": 32, "train": [str(folder / "corpus")]},
            "train": {
                "steps": 4, "run_dir": str(folder / "run"), "checkpoint_interval": 0, "tensorboard": False, **train
            },
        },
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def train_on_forks(config: Path, *runs: tuple[Path, int], **parallel: int) -> None:
    """Trains that config in each run folder to its step, on two ranks of tests/ranks.py, which start quickly. A run
    that has a checkpoint resumes."""
    asked = []
    for run, steps in runs:
        run.mkdir(exist_ok=True)
        keys = json.loads(config.read_text())
        keys["megalite"]["train"] |= {"steps": steps, "run_dir": str(run), "checkpoint_interval": 0}
        keys["megalite"]["parallel"] = parallel
        asked.append((keys, nothing))
    assert run_ranks(2, train, asked, timeout_seconds=1000) == [[0] * len(runs)] * 2


class Start:
    """A program that a launcher runs, in a session of its own, its output in a file; from the first of `hosts`, with
    `options` in place of those for this machine, where they are given."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        launcher: str = "deepspeed",
        ranks: int = 2,
        hosts: Sequence[Host] = (),
        options: Sequence[str] | None = None,
        program: str = "launcher/pretrain.py",
        variables: dict[str, str] | None = None,
        names_port: bool = True,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = {
            "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks)],
            "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks)],
            "run": [sys.executable, str(REPOSITORY / "launcher/run.py"), "--num_gpus", str(ranks)],
        }[launcher]
        if options is not None:
            command = [*command[:-2], *options]
        if names_port:
            command += ["--master_port", str(port)]
        command += [str(REPOSITORY / program), *arguments]
        self.hosts = hosts
        self.output = folder / f"output{port}"
        environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
        }
        environment |= variables or {}
        with self.output.open("w") as file:
            self.top = subprocess.Popen(
                hosts[0].inside(folder, *command) if hosts else command,
                cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.seen: dict[int, psutil.Process] = {}

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        """What the program itself says on standard error in one line, and launcher/run.py."""
        return [
            line
            for line in self.text.splitlines()
            if line.startswith(("pretrain.py: ", "run.py: "))
        ]

    def look(self) -> None:
        """Remembers every process of the start that runs now."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.top.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)
        for host in self.hosts:
            for process in host.processes():
                self.seen.setdefault(process.pid, process)

    @property
    def run(self) -> psutil.Process:
        """launcher/run.py, which is not the top process where that only enters a host."""
        return next(
            p for p in self._living() if _words(p)[1:2] == [str(REPOSITORY / "launcher/run.py")]
        )

    def of(self, word: str) -> list[psutil.Process]:
        """Those with this word on their command line."""
        return [p for p in self._living() if word in _words(p)]

    @property
    def launcher(self) -> psutil.Process:
        return self.of("deepspeed.launcher.launch")[0]

    @property
    def ranks(self) -> list[psutil.Process]:
        """The ranks in order."""
        program = str(REPOSITORY / "launcher/pretrain.py")
        found = {_rank(p): p for p in self._living() if program in _words(p)[:3]}
        return [found[rank] for rank in sorted(found.keys() - {""}, key=int)]

    def _living(self) -> list[psutil.Process]:
        self.look()
        return [p for p in self.seen.values() if _words(p)]

    def wait(self, seconds: float = START_SECONDS) -> int:
        """The top process's exit code, 128 + N for a signal; every other process has ended too."""
        deadline = time.monotonic() + seconds
        while self.top.poll() is None or self._living():
            assert time.monotonic() < deadline, (
                f"{self._living()} still run after {seconds} s\n{self.text}"
            )
            time.sleep(0.05)
        code = self.top.returncode
        return 128 - code if code < 0 else code

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and self.top.poll() is None, self.text
            time.sleep(0.05)
        self.look()

    def kill(self) -> None:
        """All that is left of it, for a test that failed."""
        for process in [*self._living(), self.top]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.top.wait()


def _words(process: psutil.Process) -> list[str]:
    """Its command line; none where it has ended."""
    try:
        return process.cmdline() if process.is_running() else []
    except psutil.Error:
        return []


def _rank(process: psutil.Process) -> str:
    """Empty for a process that is no rank."""
    try:
        return process.environ().get("RANK", "")
    except psutil.Error:
        return ""


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    file = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line[-1] == "\n"]
        if file.exists()
        else []
    )


def checkpoints(run: Path) -> list[int]:
    """Steps that have a checkpoint."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")
    )


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("deepspeed_*")}
