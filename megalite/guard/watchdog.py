"""Watchdog: a time limit for each part of a run, and a report of what each rank was doing when it hung or failed.

Each rank has a watchdog thread. If a part takes longer than its limit, or a rank fails (a peer's death shows as an
error of gloo, or as a process of the node that is gone), every live rank writes a file into the run's `faults/START/`:
a line with where it is and which ranks it waits for, a line from NCCL's flight recorder (flight.py), then the stacks of
its threads. The lowest of these ranks writes `summary.txt` and prints its first line; all exit with 1. Collectives do
not work any more then, so one rank of each node polls that folder, which all nodes share, and tells its neighbours by a
signal. Signals: signals.py.
"""

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist

from megalite.config.limits import Limits
from megalite.errors import MegaliteError
from megalite.guard.flight import Flight, from_text, in_words, own_flight, to_text, waited_for
from megalite.guard.flight import guilty as late_ranks
from megalite.ranks.run_program import print_line
from megalite.ranks.signals import killed_ranks, leave_word, listen, parent_of

POLL_SECONDS = 0.5
LOOK_SECONDS = 1.0  # between two polls of the folder by one rank of a node
# For other ranks to write their files, before this one exits and a launcher kills them.
SETTLE_SECONDS = 3.0
REPORT_SECONDS = 20.0  # for the whole report; then the rank exits without one
FAULT_CODE = 1
SUMMARY = "summary.txt"
_KILLED, _FAILED, _SILENT, _BUSY, _WAITS = (
    "was killed",
    "failed",
    "did not report",
    "was busy",
    "waited for others",
)
_CAUSES = (_KILLED, _FAILED, _SILENT, _BUSY)  # the most likely first
_LATE = "had not reached the call that others waited in"


class Watchdog:
    """The watchdog of a rank; its constructor is collective. For the report, `instruction` returns what the pipeline is
    doing, and `waits_for` the rank whose message it is waiting for."""

    def __init__(self, run_dir: Path, limits: Limits) -> None:
        self.rank, self.limits = dist.get_rank(), limits
        self.instruction: Callable[[], str] = str
        self.waits_for: Callable[[], int | None] = lambda: None
        everyone: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size()
        dist.all_gather_object(
            everyone, (socket.gethostname(), os.getpid(), time.strftime("%Y%m%d-%H%M%S"))
        )
        self.hosts, self.pids = [host for host, _, _ in everyone], [pid for _, pid, _ in everyone]
        # Named by rank 0's time, so that files of an earlier start are not mistaken for this one's.
        self.folder = run_dir / "faults" / f"{everyone[0][2]}-{everyone[0][1]}"
        # `listen` must first be called in the main thread.
        self.lock, self.signals = threading.Lock(), listen()
        self.node, self.alone_since = {*self._neighbours()}, -1.0
        self.has_failed = False
        self._begin("start", limits.first_step_seconds)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, part: str, limit_seconds: float) -> Iterator[None]:
        """Limits the time of the block. part: its name in the report."""
        self._begin(part, limit_seconds)
        yield
        self._rest()  # not after an error, whose report names the part

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        """Reports the exception of this rank's main thread. If megalite raised it on purpose, the program prints its
        line, and this rank only writes its file, unless all ranks raise the error."""
        if isinstance(error, MegaliteError):
            if not error.agreed and len(self.hosts) > 1:
                self._leave_for_others(error)
        elif isinstance(error, Exception):
            self._failed(error)
        self._rest()

    def _rest(self) -> None:
        self.part, self.limit = "", float("inf")

    def _leave_for_others(self, error: MegaliteError) -> None:
        """Writes this rank's file, so that other nodes find it. With NCCL they would otherwise wait until the step's
        limit."""
        self.has_failed = True
        with contextlib.suppress(OSError):  # the error itself matters more
            self.folder.mkdir(parents=True, exist_ok=True)
            cause = " ".join(str(error).split())
            self._write(f"{_FAILED} |  | {self._where()}: {cause}", own_flight(), "")

    def _failed(self, error: Exception) -> NoReturn:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}".partition(
            ". This is typically"
        )[0]
        lost = isinstance(error, dist.DistError) or re.search(
            "gloo|nccl|connection", cause, re.IGNORECASE
        )
        if not lost:
            print_line(
                RuntimeError(
                    f"rank {self.rank} on {self.hosts[self.rank]}: {self._where()}: {cause}"
                )
            )
        text = "".join(traceback.format_exception(error))
        self._end(_WAITS if lost else _FAILED, reversed(frames), cause, text)

    def _begin(self, part: str, limit_seconds: float) -> None:
        self.since, self.limit, self.part = time.monotonic(), limit_seconds, part

    def _watch(self) -> None:
        looked = 0.0
        while True:
            time.sleep(POLL_SECONDS)
            if self.has_failed:  # this rank's file is written, and the process is about to exit
                return
            now = time.monotonic()
            if self.part and now - self.since > self.limit:
                self._end(_BUSY, _main_frames(), f"longer than its limit of {self.limit:g} s")
            if self.signals.peer_lost:
                self._end(_BUSY, _main_frames(), "when another rank was lost or had failed")
            if now - looked > LOOK_SECONDS:
                looked, found = now, False
                with contextlib.suppress(OSError):  # the file system is unavailable
                    found = self._looks_for_its_node() and self.folder.exists()
                if found:
                    self._end(_BUSY, _main_frames(), "when another rank had failed")
                if self._is_left_alone():
                    self._end(_BUSY, _main_frames(), "when a rank of this node was gone")

    def _looks_for_its_node(self) -> bool:
        """Whether this is the lowest live rank of its node: thousands of polling ranks would overload a file system."""
        return not any(rank < self.rank for rank, _ in self._neighbours())

    def _is_left_alone(self) -> bool:
        """Whether two polls within one part have found a neighbour gone. gloo then raises an error; under NCCL a device
        waits forever, and stock `deepspeed` stops the other ranks one by one, with half a minute for each. Two polls,
        because ranks also exit one after another at a run's end, within a moment."""
        before, since = self.alone_since, self.since
        lost = self.part and self.node != {*self._neighbours()}
        self.alone_since = since if lost else -1.0
        return self.alone_since == before == since

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """Live ranks of this node other than this one, and their processes."""
        for rank, (host, pid) in enumerate(zip(self.hosts, self.pids, strict=True)):
            if (
                rank != self.rank
                and host == self.hosts[self.rank]
                and parent_of(pid) == os.getppid()
            ):
                yield rank, pid

    def _where(self) -> str:
        seconds = time.monotonic() - self.since
        return ", ".join(
            filter(
                None, [self.part or "between two parts", self.instruction(), f"for {seconds:.1f} s"]
            )
        )

    def _end(self, kind: str, frames: Iterable[FrameType], cause: str, text: str = "") -> NoReturn:
        """Writes this rank's file, waits briefly for the others', writes the summary if this is the lowest, and
        exits."""
        self.lock.acquire()  # never released: both the main thread and the watchdog's may get here
        # A call to an unavailable file system may never return.
        late = threading.Timer(
            REPORT_SECONDS, self._leave, [cause, f"not written within {REPORT_SECONDS:g} s"]
        )
        late.daemon = True
        late.start()
        try:
            self._report(kind, frames, cause, text)
        except Exception as error:  # whatever it is, the rank must exit
            self._leave(cause, f"{type(error).__name__}: {error}")
        self._leave()

    def _leave(self, cause: str = "", no_report: str = "") -> NoReturn:
        """Exits this process. no_report: why there is no report."""
        if no_report:
            where = f"rank {self.rank} on {self.hosts[self.rank]}: {self.part}"
            print_line(RuntimeError(f"{where}: {cause}; no report: {no_report}"))
        # A stopped neighbour cannot receive the launcher's SIGTERM: it is continued, and then exits by itself.
        self._signal_neighbours(signal.SIGCONT)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        leave_word(FAULT_CODE)
        # A regular exit would wait for threads that wait for dead peers.
        os._exit(FAULT_CODE)

    def _report(self, kind: str, frames: Iterable[FrameType], cause: str, text: str) -> None:
        flight = own_flight()
        call, peers = _collective(frames, self.rank)
        peer = self.waits_for()
        if not call and peer is not None:
            call, peers = "recv", [peer]
        if call:
            kind = _WAITS if kind == _BUSY else kind
            cause = f"in {call}, waits for {_ranks(peers)}; {cause}"
        # The host waits for the device, whatever call it is in.
        if kind == _BUSY and (words := in_words(flight)):
            kind, cause = _WAITS, f"in {words}; {cause}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(
            f"{kind} | {','.join(map(str, peers))} | {self._where()}: {cause}", flight, text
        )
        self._signal_neighbours(signal.SIGUSR2)
        written = self._settle()
        if min(written, default=self.rank) == self.rank:
            self._sum_up(written)
        self._until(lambda: (self.folder / SUMMARY).exists())

    def _write(self, line: str, flight: Flight, text: str) -> None:
        """Writes atomically: other ranks read the file."""
        path = self.folder / f"rank_{self.rank:05d}.txt"
        beside = path.with_name(f".{path.name}")
        with beside.open("w", errors="backslashreplace") as file:
            file.write(f"{line}\n{to_text(flight)}\n{text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        beside.rename(path)

    def _settle(self) -> dict[int, tuple[str, Flight]]:
        """The first lines of the files by rank, once all ranks that can write one have done so or time is up."""
        self._until(lambda: len(self._files().keys() | killed_ranks()) == len(self.hosts))
        heads = {
            rank: path.read_text().split("\n", 2) for rank, path in sorted(self._files().items())
        }
        return {rank: (line, from_text(flight)) for rank, (line, flight, _) in heads.items()}

    def _files(self) -> dict[int, Path]:
        return {int(path.stem[5:]): path for path in self.folder.glob("rank_*.txt")}

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _sum_up(self, written: dict[int, tuple[str, Flight]]) -> None:
        killed = dict.fromkeys(killed_ranks(), f"{_KILLED} |  | ended without a report")
        nothing = f"{_SILENT} |  | no report: gone, stopped or unreachable"
        said = killed | {rank: line for rank, (line, _) in written.items()}
        parts = [said.get(rank, nothing).split(" | ", 2) for rank in range(len(self.hosts))]
        kinds = [kind for kind, _, _ in parts]
        first = next((kind for kind in _CAUSES if kind in kinds), _WAITS)
        guilty = {rank for rank, kind in enumerate(kinds) if kind == first}
        flights = {rank: flight for rank, (_, flight) in written.items()}
        if first in (_BUSY, _WAITS) and (late := late_ranks(flights)):
            guilty, first = late, first if late <= guilty and first == _BUSY else _LATE
        waits = waited_for(flights)
        waiting = [
            rank for rank, (_, peers, _) in enumerate(parts)
            if rank not in guilty
            and guilty & ({int(peer) for peer in peers.split(",") if peer.strip()} | waits.get(rank, set()))
        ]  # fmt: skip
        names = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in sorted(guilty))
        head = f"{names} {first}"
        if waiting:
            head += f"; {_ranks(waiting)} waited for {'it' if len(guilty) == 1 else 'them'}"
        lines = [
            f"rank {rank} on {self.hosts[rank]}: {where}"
            for rank, (_, _, where) in enumerate(parts)
        ]
        path = self.folder / SUMMARY
        # A rank that was stopped and then continued may come late: the first summary is kept.
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write("\n".join([head, *lines, ""]))
            print_line(RuntimeError(f"{head}: see {path} and the stacks beside it"))

    def _signal_neighbours(self, number: int) -> None:
        for _, pid in self._neighbours():
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def _main_frames() -> Iterator[FrameType]:
    """Frames of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _collective(frames: Iterable[FrameType], own: int) -> tuple[str, list[int]]:
    """The innermost call of torch.distributed, and the ranks that it waits for; empty if there is none."""
    for frame in frames:
        name, values = frame.f_code.co_name, frame.f_locals
        of_torch = frame.f_code.co_filename.endswith("distributed_c10d.py") and not name.startswith(
            "_"
        )
        if of_torch and "group" in values:
            peer = (
                values.get("src" if name == "recv" else "dst") if name in ("recv", "send") else None
            )
            ranks = (
                [peer]
                if peer is not None
                else dist.get_process_group_ranks(values["group"] or dist.group.WORLD)
            )
            return name, [rank for rank in ranks if rank != own]
    return "", []


def _ranks(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"
