"""A run that hangs says why: a limit of time for each part of a run, and what each rank was doing.

A thread on each rank. Where a part takes longer than its limit, or a rank fails (a peer's death shows as an error of
gloo, or as a process of the node that has gone), every live rank writes a file into the run's `faults/START/`: a line
of where it is and whom it waits for, a line of what NCCL's flight recorder says (flight.py), then the stacks of its
threads. The lowest of them writes `summary.txt` and prints its first line; all end with 1. Collectives no longer work
then: one rank of each node looks at that folder, which all nodes share, and tells its neighbours by a signal. Not
signals themselves (signals.py).
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
from megalite.ranks.program import print_line
from megalite.ranks.signals import killed_ranks, leave_word, listen, parent_of

POLL_SECONDS = 0.5
LOOK_SECONDS = 1.0  # between two looks of a node at the folder
SETTLE_SECONDS = 3.0  # that a rank that ends gives the others to write their files: a launcher kills them afterwards
REPORT_SECONDS = 20.0  # for all of a report, after which a rank ends without one
FAULT_CODE = 1
SUMMARY = "summary.txt"
_KILLED, _FAILED, _SILENT, _BUSY, _WAITS = (
    "was killed",
    "failed",
    "gave no word",
    "was busy",
    "waited for others",
)
_CAUSES = (_KILLED, _FAILED, _SILENT, _BUSY)  # the likeliest first
_LATE = "had not come to what others waited in"


class Watchdog:
    """One a rank, made together (collective). For the report, instruction tells what the pipeline does, and waits_for
    whose message it waits for."""

    def __init__(self, run_dir: Path, limits: Limits) -> None:
        self.rank, self.limits = dist.get_rank(), limits
        self.instruction: Callable[[], str] = str
        self.waits_for: Callable[[], int | None] = lambda: None
        everyone: list[tuple[str, int, str]] = [("", 0, "")] * dist.get_world_size()
        dist.all_gather_object(
            everyone, (socket.gethostname(), os.getpid(), time.strftime("%Y%m%d-%H%M%S"))
        )
        self.hosts, self.pids = [host for host, _, _ in everyone], [pid for _, pid, _ in everyone]
        # Rank 0's time names this start, so that files of an earlier one are not taken for this one's.
        self.folder = run_dir / "faults" / f"{everyone[0][2]}-{everyone[0][1]}"
        self.lock, self.signals = (
            threading.Lock(),
            listen(),
        )  # here: the first call is in the main thread
        self.node, self.alone_since = {*self._neighbours()}, -1.0
        self._begin("start", limits.first_step_seconds)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, part: str, limit_seconds: float) -> Iterator[None]:
        """Bounds the time of what is inside; part: its name in the report."""
        self._begin(part, limit_seconds)
        yield
        self._rest()  # not after an error: its report names the part

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        """Reports what this rank's main thread failed by, unless it is an error that megalite raised on purpose."""
        if isinstance(error, Exception) and not isinstance(error, MegaliteError):
            self._failed(error)
        self._rest()

    def _rest(self) -> None:
        self.part, self.limit = "", float("inf")

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
            now = time.monotonic()
            if self.part and now - self.since > self.limit:
                self._end(_BUSY, _main_frames(), f"longer than its limit of {self.limit:g} s")
            if self.signals.peer_lost:
                self._end(_BUSY, _main_frames(), "when another rank was lost or had failed")
            if now - looked > LOOK_SECONDS:
                looked, found = now, False
                with contextlib.suppress(OSError):  # a file system that is away now
                    found = self._looks_for_its_node() and self.folder.exists()
                if found:
                    self._end(_BUSY, _main_frames(), "when another rank had failed")
                if self._is_left_alone():
                    self._end(_BUSY, _main_frames(), "when a rank of this node was gone")

    def _looks_for_its_node(self) -> bool:
        """Whether no rank of this node below this one is alive: thousands that look would keep a file system busy."""
        return not any(rank < self.rank for rank, _ in self._neighbours())

    def _is_left_alone(self) -> bool:
        """Whether two looks in one part have found a neighbour gone. gloo raises an error then; under NCCL a device
        waits for ever, and stock `deepspeed` ends the other ranks one by one, with half a minute for each. At a run's
        end ranks end one after another too, within a moment."""
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
        """Writes this rank's file, waits a little for the others', sums up where this is the lowest, and ends."""
        self.lock.acquire()  # for good: the main thread and the watching one may both come here
        # A call to a file system that is away may never return.
        late = threading.Timer(
            REPORT_SECONDS, self._leave, [cause, f"not written within {REPORT_SECONDS:g} s"]
        )
        late.daemon = True
        late.start()
        try:
            self._report(kind, frames, cause, text)
        except Exception as error:  # whatever it is, a rank that is to end must not stay
            self._leave(cause, f"{type(error).__name__}: {error}")
        self._leave()

    def _leave(self, cause: str = "", no_report: str = "") -> NoReturn:
        """Ends this process. no_report: why there is none."""
        if no_report:
            where = f"rank {self.rank} on {self.hosts[self.rank]}: {self.part}"
            print_line(RuntimeError(f"{where}: {cause}; no report: {no_report}"))
        # A neighbour that was stopped could not hear the launcher's SIGTERM: it continues, and ends by itself.
        self._signal_neighbours(signal.SIGCONT)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        leave_word(FAULT_CODE)
        os._exit(
            FAULT_CODE
        )  # the interpreter's end would wait for threads that wait for dead peers

    def _report(self, kind: str, frames: Iterable[FrameType], cause: str, text: str) -> None:
        flight = own_flight()
        call, peers = _collective(frames, self.rank)
        peer = self.waits_for()
        if not call and peer is not None:
            call, peers = "recv", [peer]
        if call:
            kind = _WAITS if kind == _BUSY else kind
            cause = f"in {call}, waits for {_ranks(peers)}; {cause}"
        if kind == _BUSY and (
            words := in_words(flight)
        ):  # its host waits for the device, in any call
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
        """Whole or not there: others read it."""
        path = self.folder / f"rank_{self.rank:05d}.txt"
        beside = path.with_name(f".{path.name}")
        with beside.open("w", errors="backslashreplace") as file:
            file.write(f"{line}\n{to_text(flight)}\n{text}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        beside.rename(path)

    def _settle(self) -> dict[int, tuple[str, Flight]]:
        """First lines of the files by rank, once there is one of each that may write one or the time is over."""
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
        killed = dict.fromkeys(killed_ranks(), f"{_KILLED} |  | ended without a word")
        nothing = f"{_SILENT} |  | no word of it: gone, stopped or out of reach"
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
        head = f"{names} {first}" + f"; {_ranks(waiting)} waited for it" * bool(waiting)
        lines = [
            f"rank {rank} on {self.hosts[rank]}: {where}"
            for rank, (_, _, where) in enumerate(parts)
        ]
        path = self.folder / SUMMARY
        # One that was stopped and continues comes late: the first summary is kept.
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write("\n".join([head, *lines, ""]))
            print_line(RuntimeError(f"{head}: {path} and the stacks beside it tell more"))

    def _signal_neighbours(self, number: int) -> None:
        for _, pid in self._neighbours():
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def _main_frames() -> Iterator[FrameType]:
    """Of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _collective(frames: Iterable[FrameType], own: int) -> tuple[str, list[int]]:
    """The innermost call of torch.distributed, and the ranks that it waits for; empty where there is none."""
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
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
