"""Runs a function on several ranks: `run_ranks(8, function)`, for tests of everything distributed.

Each rank is a process forked from a server that has imported torch, DeepSpeed and megalite once (tests/preload.py), so
that a world of eight starts in about a second. An exception on one rank fails the call with the tracebacks, and the
other ranks are killed; a call that takes too long fails with the stack of every rank. No rank outlives the call, nor
the process that made it.

This file does not use the launcher: tests of `deepspeed` itself are in tests/launch. programs.py runs whole programs
with the same server.
"""

import ctypes
import faulthandler
import functools
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent
STACK_SIGNAL = signal.SIGRTMIN  # SIGUSR1 belongs to the training loop
GRACE_SECONDS = 0.5  # for other ranks' own tracebacks, after the first
OUTPUT_CHARACTERS = 6000  # of each rank's output, shown on a failure
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

CONTEXT = multiprocessing.get_context("forkserver")


class RankFailure(AssertionError):
    """A rank raised, died or did not finish in time; the text has the report of each rank."""


@dataclass
class Rank:
    """One rank, as seen by its parent. outcome: None until the rank has reported."""

    number: int
    process: BaseProcess
    connection: Connection
    folder: Path
    outcome: tuple[str, Any] | None = None

    @property
    def output_file(self) -> Path:
        return self.folder / f"rank{self.number}.output"

    @property
    def stack_file(self) -> Path:
        return self.folder / f"rank{self.number}.stacks"


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 120,
    init: bool = True,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` processes and return their results in rank order.

    `function` is defined at a module's top level; it, its arguments and its results are pickled. With `init`,
    torch.distributed (gloo, on the loopback interface) is initialised before the call; without, the environment
    (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is ready for `deepspeed.init_distributed()`.
    Each rank computes with one thread. Raises RankFailure.
    """
    __tracebackhide__ = True
    start_server()
    # The store's server is in this process, on a port chosen by the kernel, so that two worlds never use the same one.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder = Path(tempfile.mkdtemp(prefix="ranks_"))
    ranks: list[Rank] = []
    try:
        call = pickle.dumps((function, args))
        for number in range(world_size):
            ranks.append(
                _start_rank(number, world_size, store.port, folder, call, timeout_seconds, init)
            )
        _collect(ranks, timeout_seconds)
        for rank in ranks:
            _print_output(rank)
        return [rank.outcome[1] for rank in ranks if rank.outcome is not None]
    finally:
        for rank in ranks:
            _kill(rank)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def start_server() -> None:
    """Start the forkserver and wait until it has imported everything, so that no test's timeout includes that."""
    environment = {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
        # Python 3.11's forkserver does not pass sys.path on to what it preloads (CPython issue 126631).
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
    }
    with _environment(environment):
        CONTEXT.set_forkserver_preload(["tests.preload"])
        forkserver.ensure_running()
        probe = CONTEXT.Process(target=os.getpid)
        probe.start()
        probe.join()
    if probe.exitcode != 0:
        raise RankFailure("the forkserver of tests/ranks.py did not start: see the error output")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _start_rank(
    number: int,
    world_size: int,
    port: int,
    folder: Path,
    call: bytes,
    timeout_seconds: float,
    init: bool,
) -> Rank:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    rank = Rank(number, None, ours, folder)  # type: ignore[arg-type]
    environment = {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Env:// joins the existing store, rank 0 creates none.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    arguments = (
        theirs,
        environment,
        rank.output_file,
        rank.stack_file,
        call,
        timeout_seconds,
        init,
    )
    rank.process = CONTEXT.Process(
        target=_rank_main, args=arguments, name=f"rank{number}", daemon=False
    )
    rank.process.start()
    theirs.close()
    return rank


def _rank_main(
    connection: Connection,
    environment: dict[str, str],
    output_file: Path,
    stack_file: Path,
    call: bytes,
    timeout_seconds: float,
    init: bool,
) -> None:
    """The main function of a rank: reports ("result", pickled value) or ("error", traceback)."""
    die_with_parent()
    os.setsid()  # so that the parent can kill what this rank starts together with it
    output = os.open(output_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    stacks = stack_file.open("w")
    faulthandler.enable(stacks)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)
    os.environ.update(environment)
    try:
        function, args = pickle.loads(call)
        if init:
            # Longer than the call's own limit, so that a stuck collective shows as a stack and not as gloo's error.
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds + 60))
        result = function(int(environment["RANK"]), int(environment["WORLD_SIZE"]), *args)
        report = ("result", pickle.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        report = ("error", traceback.format_exc())
    connection.send(report)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a library's atexit hook or thread must not keep a rank alive that has reported.
    os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this rank when the forkserver ends, which ends with the process that runs the tests."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The server ends when the last copy of this pipe is closed, and every rank is handed one.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it exited before prctl
        os._exit(1)


def _collect(ranks: Sequence[Rank], timeout_seconds: float) -> None:
    """Wait for each rank's report; raise RankFailure at the first bad one."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout_seconds
    # In the order of their reports: the first is likely the cause of the others.
    failed: list[Rank] = []
    while waiting := {rank.connection: rank for rank in ranks if rank.outcome is None}:
        ready = multiprocessing.connection.wait(
            list(waiting), max(0.0, deadline - time.monotonic())
        )
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            _receive(rank)
            if rank.outcome is not None and rank.outcome[0] != "result":
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failed:
        raise RankFailure(_report(failed, len(ranks)))
    stuck = [rank for rank in ranks if rank.outcome is None]
    if stuck:
        numbers = ", ".join(str(rank.number) for rank in stuck)
        _dump_stacks(stuck)
        raise RankFailure(
            f"rank {numbers} did not end within {timeout_seconds} s\n" + _report(stuck, len(ranks))
        )


def _receive(rank: Rank) -> None:
    try:
        kind, value = rank.connection.recv()
        rank.outcome = (kind, pickle.loads(value) if kind == "result" else value)
    except EOFError:
        rank.process.join()
        rank.outcome = ("death", f"died with exit code {rank.process.exitcode}, without a report")


def _dump_stacks(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.outcome = ("timeout", "did not end")
        # Without its handler a rank would be killed by the signal; the handler is installed if the file exists.
        if rank.process.pid is not None and rank.stack_file.exists():
            os.kill(rank.process.pid, STACK_SIGNAL)
    time.sleep(GRACE_SECONDS)


def _report(shown: Sequence[Rank], world_size: int) -> str:
    lines = []
    for rank in shown:
        assert rank.outcome is not None
        lines.append(
            f"---- rank {rank.number} of {world_size}: {rank.outcome[0]}\n{rank.outcome[1]}"
        )
        lines += [_section("stacks", rank.stack_file), _section("output", rank.output_file)]
    return "\n".join(line for line in lines if line)


def _section(title: str, file: Path) -> str:
    text = file.read_text(errors="replace")[-OUTPUT_CHARACTERS:].strip() if file.exists() else ""
    return f"-- {title}\n{text}" if text else ""


def _print_output(rank: Rank) -> None:
    """Pass a rank's output on to this process's, where pytest shows it if the test fails afterwards."""
    if text := _section(f"rank {rank.number}", rank.output_file):
        print(text)


def _kill(rank: Rank) -> None:
    """Kill a rank and all its child processes, and wait for its end."""
    if rank.process.pid is not None and rank.process.is_alive():
        # Its group exists only once it has called setsid.
        for kill in (os.killpg, os.kill):
            try:
                kill(rank.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    rank.process.join()
    rank.process.close()
    rank.connection.close()
