"""One start of stock `deepspeed`, with a guard on every host, until its end: each rank's exit code, and who failed.

The exit code of `deepspeed` is not enough: killed midway it exits with 0 (launcher/runner.py:639), and over ssh with
whatever came last. Next: restarts.py.
"""

import contextlib
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megalite.errors import MegaliteError, UserError
from megalite.ranks.launch import PASSED_ON, VISIBLE
from megalite.ranks.local import free_port
from megalite.ranks.signals import EXIT_BASE, LAUNCH, LOST
from megalite.supervisor.host_guard import MARK, NO_WORD
from megalite.supervisor.hostfile import write_hostfile
from megalite.supervisor.remote import (
    ENV_FILE,
    SSH_ALIVE,
    bare_for_deepspeed,
    harmless_environment,
    python_module,
    ssh,
    variables,
    word_for_deepspeed,
    write_env_file,
)

POLL_SECONDS = 0.2
BEAT_SECONDS = 2.0  # between heartbeats to a guard, which relies on them (host_guard.py)
READY_SECONDS = 60.0
REPORT_SECONDS = 2.0  # after a failure, until the remaining ranks are asked for a report
FAILURE_SECONDS = 8.0  # after a failure, until they are killed
LAST_LINES_SECONDS = 0.5  # after the end of all ranks, wait for `deepspeed` if a rank failed
DONE_SECONDS = 30.0
"""The same if all succeeded: a remote shell stays while any process that a rank has left behind holds its output."""
SEEN_SECONDS = 2.0  # until the end of a rank is noticed
# After a signal, until ranks are killed (--grace_seconds): time for a last checkpoint.
STOP_SECONDS = 120.0
CLOSE_SECONDS = 1.0  # at the end, until the guards' remaining connections are killed
THIS = "localhost"
SSH_ARGS = "PDSH_SSH_ARGS_APPEND"  # pdsh's


class HostsLost(MegaliteError):
    """Hosts whose guard does not start, with the reasons."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.hosts = list(reasons)
        super().__init__("; ".join(f"{host}: {words}" for host, words in reasons.items()))


def name_of_run() -> str:
    """A random prefix for the folders of a run's starts, the same on every host; nobody can create them beforehand."""
    return f"/tmp/megalite-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class LaunchedProgram:
    """What to start. options: for `deepspeed`. words: a script and its arguments. over_ssh: on the hosts of a
    hostfile."""

    options: list[str]
    words: list[str]
    over_ssh: bool
    ssh_port: int | None
    master_addr: str | None
    grace_seconds: float = STOP_SECONDS
    """Time after a signal to stop until the remaining ranks are killed."""


@dataclass
class ReceivedSignals:
    """Signals that this process received. stop: the first one that asks it to stop (0: none)."""

    stop: int = 0
    waiting: list[int] = field(default_factory=list)

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # Under nohup SIGHUP is ignored, and must stay ignored.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    def _take(self, number: int, frame: object) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        if number != signal.SIGUSR1:
            if self.stop:
                return
            self.stop = number
        self.waiting.append(number)


@dataclass
class Outcome:
    """How a start ended. code: 0, 1, 2, or 128 + N for signal N. who: who failed and how, as text."""

    code: int
    who: str = ""


class HostGuard:
    """The local end of the connection to a guard."""

    def __init__(self, host: str, folder: str, port: int | None, ssh_log: Path) -> None:
        self.host, self.ssh_log, self.lost, self.over = host, ssh_log, False, False
        self.address, self.refusal = "", ""
        words = python_module("megalite.supervisor.host_guard", folder)
        with ssh_log.open("w") as file:
            self.process = subprocess.Popen(
                words if host == THIS else ssh(host, words, port),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip

    def read(self, into: "queue.Queue[tuple[HostGuard, str]]") -> None:
        """Puts the guard's lines into a queue, and an empty one at its end."""
        output = self.process.stdout
        assert output is not None
        for line in output:
            _, mark, said = line.decode(errors="replace").partition(MARK)
            if mark:
                into.put((self, said.strip()))
        into.put((self, ""))

    @property
    def why_missing(self) -> str:
        """Why the guard does not start."""
        return self.refusal or f"no answer by ssh: {_last_line(self.ssh_log)}"

    def send(self, line: str) -> None:
        pipe: IO[bytes] | None = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError):
            pipe.write(f"{line}\n".encode())
            pipe.flush()

    def detach(self) -> None:
        """Closes the guard's input, which makes it exit."""
        with contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def close(self, deadline: float) -> None:
        """Waits for its process, and kills it at the deadline (by `time.monotonic`)."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.wait()


class Attempt:
    """One start of the run named `run`. hosts: ranks by host, in order."""

    def __init__(
        self, program: LaunchedProgram, hosts: dict[str, int], run: str, signals: ReceivedSignals
    ) -> None:
        self.program, self.hosts, self.signals = program, hosts, signals
        # New each time: all users have seen the last one.
        self.name = f"{run}-{secrets.token_hex(8)}"
        self.world_size = sum(hosts.values())
        self.events: queue.Queue[tuple[HostGuard, str]] = queue.Queue()
        self.guards: list[HostGuard] = []
        self.running: dict[int, HostGuard] = {}
        self.words: dict[int, str] = {}
        self.host_of_rank: dict[int, str] = {}
        self.gone: list[int] = []  # ended without an exit code, in order
        self.failed_at: float | None = None
        self.ended_at: float | None = None  # of all ranks
        self.child_ended_at: float | None = None
        self.orphaned = False  # whether `deepspeed` ended before the ranks
        self.beat = 0.0
        self.stopped_at: float | None = None
        self.asked = self.ending = False

    def run(self) -> Outcome:
        """Starts the ranks, waits for their end, and leaves no process on any host. Raises HostsLost before ranks
        start."""
        with (
            tempfile.TemporaryDirectory(prefix="megalite_start_") as folder,
            self._guarded(Path(folder)),
        ):
            if self.signals.stop:
                return Outcome(EXIT_BASE + self.signals.stop)
            child = self._start(Path(folder))
            try:
                while not self._is_over(child):
                    self._step()
                code = child.poll()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                left = dict(self.running)
                self._end_guards()
        return self._outcome(code, left)

    @contextlib.contextmanager
    def _guarded(self, folder: Path) -> Iterator[None]:
        """Starts a guard on each host and one here, and waits until all are ready."""
        names = [THIS, *self.hosts] if self.program.over_ssh else [THIS]
        try:
            for number, host in enumerate(names):
                guard = HostGuard(
                    host, self.name, self.program.ssh_port, folder / f"ssh_log{number}"
                )
                self.guards.append(guard)
                threading.Thread(target=guard.read, args=(self.events,), daemon=True).start()
            deadline = time.monotonic() + READY_SECONDS
            while time.monotonic() < deadline and not self.signals.stop:
                if all(guard.address or guard.lost for guard in self.guards):
                    break
                self._hear()
            missing = [guard for guard in self.guards if guard.lost or not guard.address]
            if missing and not self.signals.stop:
                self._end_guards()
                raise HostsLost({guard.host: guard.why_missing for guard in missing})
            yield
        finally:
            self._detach_all()

    def _detach_all(self) -> None:
        """Closes all guards, with one deadline for all."""
        for guard in self.guards:
            guard.detach()
        deadline = time.monotonic() + CLOSE_SECONDS
        for guard in self.guards:
            guard.close(deadline)

    def _start(self, folder: Path) -> "subprocess.Popen[bytes]":
        program, options, words = self.program, list(self.program.options), list(self.program.words)
        environment = dict(os.environ)
        own = {LAUNCH: self.name}
        if program.over_ssh:
            write_hostfile(folder / "hostfile", self.hosts)
            write_env_file(folder / "environment", variables(own))
            options += ["--hostfile", str(folder / "hostfile"), "--force_multi", "--no_ssh_check"]
            options += ["--master_addr", program.master_addr or self._master()]
            options = [bare_for_deepspeed(option) for option in options]
            words = [bare_for_deepspeed(words[0]), *map(word_for_deepspeed, words[1:])]
            environment = harmless_environment()
            environment[SSH_ARGS] = " ".join(
                filter(None, [environment.get(SSH_ARGS, ""), SSH_ALIVE])
            )
            environment[ENV_FILE] = str(folder / "environment")
        else:
            options += ["--hostfile", str(folder / "none"), "--num_gpus", str(self.world_size)]
            if "--master_port" not in options:  # another run on this machine may use DeepSpeed's
                options += ["--master_port", str(free_port())]
            if VISIBLE in environment:
                own[PASSED_ON] = environment[VISIBLE]
        # Set by a launcher that may have started this process.
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.pop(key, None)
        return subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *options, *words],
            env=environment | own, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def _master(self) -> str:
        first = self.guards[1]
        if first.address.startswith(("127.", "::1")) and len(self.hosts) > 1:
            # Debian's /etc/hosts maps a host's own name to such an address; DeepSpeed also asks hostname -I.
            command = ssh(first.host, ["hostname", "-I"], self.program.ssh_port)
            addresses = subprocess.run(command, capture_output=True, text=True).stdout.split()
            if not addresses:
                raise MegaliteError(
                    f"{first.host}: hostname -I prints no address: give --master_addr"
                )
            return addresses[0]
        return first.address

    def _step(self) -> None:
        """Reads from the guards, passes signals on, and asks hanging ranks for a report."""
        self._hear()
        now = time.monotonic()
        while self.signals.waiting:
            number = self.signals.waiting.pop(0)
            self._send_all(f"signal {number}")
            if number != signal.SIGUSR1:
                self.stopped_at = now
        if self.failed_at is not None and now - self.failed_at > REPORT_SECONDS and not self.asked:
            self._send_all(f"signal {signal.SIGUSR2.value}")
            self.asked = True

    def _is_over(self, child: "subprocess.Popen[bytes]") -> bool:
        now = time.monotonic()
        if child.poll() is not None:
            if not self.running:
                return True
            self.child_ended_at = self.child_ended_at or now
            if now - self.child_ended_at > SEEN_SECONDS and not self.orphaned:
                self.orphaned = True
                # The grace period of an earlier signal continues.
                self.stopped_at = self.stopped_at or now
                self._send_all(f"signal {signal.SIGTERM.value}")
        if self.failed_at is not None and now - self.failed_at > FAILURE_SECONDS:
            return True
        ending = DONE_SECONDS if {*self.words.values()} == {"0"} else LAST_LINES_SECONDS
        if self.ended_at is not None and now - self.ended_at > ending:
            return True
        return self.stopped_at is not None and now - self.stopped_at > self.program.grace_seconds

    def _hear(self) -> None:
        """Processes the guards' lines for POLL_SECONDS, and sends heartbeats."""
        deadline = time.monotonic() + POLL_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                guard, line = self.events.get(timeout=left)
            except queue.Empty:
                break
            self._take(guard, line)
        if time.monotonic() - self.beat > BEAT_SECONDS:
            self.beat = time.monotonic()
            self._send_all("")

    def _take(self, guard: HostGuard, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "ready":
            guard.address = rest.split()[0]
        elif kind == "refused":
            guard.refusal = rest
        elif kind == "up":
            rank = int(rest.split()[0])
            if guard.host != THIS or not self.program.over_ssh:
                self.running[rank], self.host_of_rank[rank] = guard, guard.host
        elif kind == "down":
            number, _, word = rest.partition(" ")
            self._down(int(number), word)
        elif kind == "over":
            guard.over = True
        elif not line:
            guard.lost = not guard.over
            if guard.lost and guard.address:
                self.failed_at = self.failed_at or time.monotonic()
                self.running = {rank: of for rank, of in self.running.items() if of is not guard}

    def _down(self, rank: int, word: str) -> None:
        self.running.pop(rank, None)
        now = time.monotonic()
        if word != NO_WORD:
            self.words[rank] = word
            # The others may wait for it.
            if int(word.split()[0]) in (MegaliteError.exit_code, UserError.exit_code):
                self.failed_at = self.failed_at or now
        elif rank not in self.words and rank not in self.gone and not self.ending:
            self.gone.append(rank)
            self.failed_at = self.failed_at or now
            self._send_all(f"killed {rank}")
        if len(self.words) + len(self.gone) == self.world_size:
            self.ended_at = self.ended_at or now

    def _send_all(self, line: str) -> None:
        for guard in self.guards:
            guard.send(line)

    def _end_guards(self) -> None:
        self.ending = True
        self._send_all("end")
        deadline = time.monotonic() + FAILURE_SECONDS
        while time.monotonic() < deadline:
            if all(guard.over or guard.lost for guard in self.guards):
                break
            self._hear()

    def _outcome(self, code: int | None, left: dict[int, HostGuard]) -> Outcome:
        codes = {rank: int(word.split()[0]) for rank, word in self.words.items()}
        if self.signals.stop:
            return Outcome(EXIT_BASE + self.signals.stop)
        if code in (0, None) and len(codes) == self.world_size and not any(codes.values()):
            return Outcome(0)
        if 2 in codes.values() or (code == 2 and not self.host_of_rank):
            return Outcome(2)
        launchers = [rank for rank, word in self.words.items() if LOST in word]
        ended = {value for value in codes.values() if value > EXIT_BASE}
        alone = not launchers and not self.orphaned
        if alone and len(codes) == self.world_size and len(ended) == len(set(codes.values())) == 1:
            return Outcome(ended.pop())  # a rank or its launcher had the signal
        return Outcome(1, self._who(code, left, launchers, codes))

    def _who(
        self,
        code: int | None,
        left: dict[int, HostGuard],
        launchers: list[int],
        codes: dict[int, int],
    ) -> str:
        """The most likely cause, as text."""
        lost = [guard.host for guard in self.guards if guard.lost]
        failed = [rank for rank, value in codes.items() if value == 1]
        causes = {
            "was lost": [f"host {host}" for host in lost],
            "was killed": self._names(self.gone[:1]),
            "did not end by itself": self._names(list(left)),
            "lost the launcher of its host": self._names(launchers),
            "ended with 1": self._names(failed),
        }
        for how, names in causes.items():
            if names:
                return f"{', '.join(names)} {how}"
        when = " before a rank started"
        if self.host_of_rank:
            when = " before the ranks" if self.orphaned else ""
        return f"deepspeed ended with {code}{when}"

    def _names(self, ranks: list[int]) -> list[str]:
        return [
            f"rank {rank} on {self.host_of_rank.get(rank, 'an unknown host')}"
            for rank in sorted(ranks)
        ]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
