"""A process on each host that watches the ranks of one start there, as long as launcher/run.py lives.

    python -m megalite.supervisor.host_guard FOLDER

It finds the processes of the start by the variable MEGALITE_LAUNCH=FOLDER in their environment, which they inherit. On
standard output it writes a line for each rank that starts (`up RANK PID`) and ends (`down RANK WORD`: the word that the
rank left, or `-` for none, if it was killed), and `refused WHY` if FOLDER does not belong to this user alone. From
standard input it reads `signal N` (for the ranks), `killed RANK` (on any host), `end`, and heartbeats (empty lines). If
nothing comes for a while, the launcher is gone or unreachable: the ranks are stopped, and killed if they do not exit.
It exits when no process of the start is left. It imports only Python's library, to start fast. Next: restarts.py.
"""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from megalite.ranks.signals import KILLED, LAUNCH, parent_of, private_folder

POLL_SECONDS = 0.5
SILENCE_SECONDS = 30.0
GRACE_SECONDS = 30.0  # for the ranks' last checkpoint, as in DeepSpeed's launcher
KILL_SECONDS = 10.0  # a process in a system call may take a while to die
NO_WORD = "-"
WORD_BYTES = 80  # longer than any word
# Prefix of each line: the output of a host's shell comes on the same stream.
MARK = "megalite guard: "


class Guard:
    """folder: where ranks leave their last words; its name, RUN-START, identifies the start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop = folder, 0
        self.inside = -1  # a descriptor of the folder: its path may be reused by another user
        self.seen: dict[int, str] = {}  # rank by process
        self.helpers: set[int] = set()  # processes that ranks have started, and may leave behind
        self.reported: set[str] = set()
        self.last_contact = time.monotonic()
        self.rest = b""

    def run(self) -> None:
        # An earlier start of the same run may have left ranks here while the host was out of reach.
        _kill(str(self.folder).rpartition("-")[0])
        try:
            # Another guard on this host may have created it.
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            self.inside = private_folder(str(self.folder))
        except OSError as error:
            _say(
                f"refused {self.folder}: {error.strerror}: must be a folder that only this user can access"
            )
            return
        _say(f"ready {_address()} {os.cpu_count()}")
        while self._hear():
            self._look()
        _kill(str(self.folder))
        self._look()
        # Ranks that started and ended between two looks.
        for name in sorted(os.listdir(self.inside)):
            if name.startswith("rank_"):
                self._report(name.removeprefix("rank_"))
        for name in os.listdir(self.inside):
            if name.removeprefix("rank_") in self.reported or name.startswith(KILLED):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self.inside)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        _say("over")

    def _hear(self) -> bool:
        """Reads commands, waiting briefly. Returns False if the guard must exit now."""
        if select.select([0], [], [], POLL_SECONDS)[0]:
            read = os.read(0, 4096)
            self.last_contact = time.monotonic()
            *lines, self.rest = (self.rest + read).split(b"\n")
            for line in lines:
                if line == b"end":
                    return False
                word, _, number = line.partition(b" ")
                if word == b"signal":
                    self._signal(int(number))
                if word == b"killed":
                    with contextlib.suppress(OSError):
                        os.close(
                            os.open(f"{KILLED}{int(number)}", os.O_CREAT, 0o600, dir_fd=self.inside)
                        )
            if not read:
                return self._orphaned()
        return time.monotonic() - self.last_contact < SILENCE_SECONDS or self._orphaned()

    def _signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.stop = number
        for pid in self._ranks():
            _send(pid, number)

    def _orphaned(self) -> bool:
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._ranks() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return False

    def _look(self) -> None:
        running = self._ranks()
        for pid in self.seen.keys() - running.keys():
            self._report(self.seen.pop(pid))
        for pid, rank in running.items():
            if pid not in self.seen:
                self.seen[pid] = rank
                _say(f"up {rank} {pid}")
                if self.stop:  # it started after the signal
                    _send(pid, self.stop)

    def _ranks(self) -> dict[int, str]:
        """Rank by process."""
        found = _processes(str(self.folder))
        processes = {
            pid: values["RANK"]
            for pid, values in found.items()
            if values.get("RANK", "").isdecimal()
        }
        first = {rank: pid for pid, rank in self.seen.items()}
        for pid, rank in processes.items():
            if parent_of(pid) in processes or rank in self.reported or first.get(rank, pid) != pid:
                self.helpers.add(pid)
        return {pid: rank for pid, rank in processes.items() if pid not in self.helpers}

    def _report(self, rank: str) -> None:
        if rank not in self.reported:
            word = NO_WORD
            # Another guard on this host may have reported and removed it.
            with contextlib.suppress(OSError):
                file = os.open(f"rank_{rank}", os.O_RDONLY, dir_fd=self.inside)
                word = os.read(file, WORD_BYTES).decode(errors="replace") or NO_WORD
                os.close(file)
            self.reported.add(rank)
            _say(f"down {rank} {word}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{MARK}{line}", flush=True)


def _send(pid: int, number: int) -> None:
    """Sends a signal to a rank. One without handlers yet has nothing to save or to report: it only gets signals to
    stop, as SIGTERM, which ends it without Python's traceback for SIGINT."""
    if not _catches(pid, signal.SIGUSR2):
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        number = signal.SIGTERM
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)
    return False


def _address() -> str:
    """An address of this host: the one by which ssh reached it, if known, since others can reach it there too."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) > 2 else "127.0.0.1"


def _processes(name: str) -> dict[int, dict[str, str]]:
    """Environments of this user's processes of the named start or run, by process id."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid != os.geteuid():  # root could read everybody's
                    continue
                text = Path(entry.path, "environ").read_bytes().decode(errors="replace")
                if f"{LAUNCH}={name}\0" in text or f"{LAUNCH}={name}-" in text:
                    found[int(entry.name)] = dict(
                        item.split("=", 1) for item in text.split("\0") if "=" in item
                    )
    return found


def _kill(name: str) -> None:
    """Kills every process of a start, also stopped ones; repeatedly, since one may just be starting another."""
    deadline = time.monotonic() + KILL_SECONDS
    while (found := _processes(name)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it exits on `end` or on silence
    Guard(Path(sys.argv[1])).run()
