"""A process on each host that watches the ranks of one start there, for as long as launcher/run.py lives.

    python -m megalite.supervisor.host_guard FOLDER

It knows the processes of the start by the variable MEGALITE_LAUNCH=FOLDER in their environment, which they inherit. On
standard output it writes a line for each rank that starts (`up RANK PID`) and ends (`down RANK WORD`, the word that it
left; `-` for none: killed), and `refused WHY` where FOLDER is not this user's alone. It reads from standard input
`signal N`, for the ranks, `killed RANK`, of one on any host, `end`, and an empty line now and then. If nothing comes
for a while, the launcher is gone or out of reach: the ranks are stopped, and killed if they do not end. It ends when
no process of the start is left. Only Python's library: it is to start fast. Next: restarts.py.
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
GRACE_SECONDS = 30.0  # for the ranks' last checkpoint, as DeepSpeed's launcher has it
KILL_SECONDS = 10.0  # a process in the kernel's hands may take its time
NO_WORD = "-"
WORD_BYTES = 80  # more than any word has
MARK = "megalite guard: "  # before each line said: what a host's shell says at its start is on the same output


class Guard:
    """folder: of the ranks' last words, and the name of the start: RUN-START."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stop = folder, 0
        self.inside = -1  # a descriptor of it: its path may come to be another's
        self.seen: dict[int, str] = {}  # rank by process
        self.helpers: set[int] = set()  # what ranks have started themselves, and may leave behind
        self.told: set[str] = set()
        self.heard = time.monotonic()
        self.rest = b""

    def run(self) -> None:
        # An earlier start of the same run may have left ranks here while the host was out of reach.
        _kill(str(self.folder).rpartition("-")[0])
        try:
            # Another guard on this host may have made it.
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            self.inside = private_folder(str(self.folder))
        except OSError as error:
            _say(f"refused {self.folder}: {error.strerror}: must be a folder of this user's alone")
            return
        _say(f"ready {_address()} {os.cpu_count()}")
        while self._hear():
            self._look()
        _kill(str(self.folder))
        self._look()
        # Of ranks that came and went between two looks.
        for name in sorted(os.listdir(self.inside)):
            if name.startswith("rank_"):
                self._tell(name.removeprefix("rank_"))
        for name in os.listdir(self.inside):
            if name.removeprefix("rank_") in self.told or name.startswith(KILLED):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self.inside)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        _say("over")

    def _hear(self) -> bool:
        """Takes in what there is to hear, waiting a little; False: to end now."""
        if select.select([0], [], [], POLL_SECONDS)[0]:
            read = os.read(0, 4096)
            self.heard = time.monotonic()
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
        return time.monotonic() - self.heard < SILENCE_SECONDS or self._orphaned()

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
            self._tell(self.seen.pop(pid))
        for pid, rank in running.items():
            if pid not in self.seen:
                self.seen[pid] = rank
                _say(f"up {rank} {pid}")
                if self.stop:  # it came after the signal
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
            if parent_of(pid) in processes or rank in self.told or first.get(rank, pid) != pid:
                self.helpers.add(pid)
        return {pid: rank for pid, rank in processes.items() if pid not in self.helpers}

    def _tell(self, rank: str) -> None:
        if rank not in self.told:
            word = NO_WORD
            # Another guard on this host may have told and removed it.
            with contextlib.suppress(OSError):
                file = os.open(f"rank_{rank}", os.O_RDONLY, dir_fd=self.inside)
                word = os.read(file, WORD_BYTES).decode(errors="replace") or NO_WORD
                os.close(file)
            self.told.add(rank)
            _say(f"down {rank} {word}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{MARK}{line}", flush=True)


def _send(pid: int, number: int) -> None:
    """A signal for a rank. One that does not listen yet has nothing to save or to report: what would end it is left
    out, and SIGTERM ends it without the traceback that Python has for SIGINT."""
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
    """An address of this host, that by which it was reached where ssh tells; others reach it by that too."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) > 2 else "127.0.0.1"


def _processes(name: str) -> dict[int, dict[str, str]]:
    """Environments of this user's processes of the start, or run, of this name, by process."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid != os.geteuid():  # root can read everybody's
                    continue
                text = Path(entry.path, "environ").read_bytes().decode(errors="replace")
                if f"{LAUNCH}={name}\0" in text or f"{LAUNCH}={name}-" in text:
                    found[int(entry.name)] = dict(
                        item.split("=", 1) for item in text.split("\0") if "=" in item
                    )
    return found


def _kill(name: str) -> None:
    """Every process of a start, a stopped one too; again, since one may have been about to start another."""
    deadline = time.monotonic() + KILL_SECONDS
    while (found := _processes(name)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when it hears so, or hears nothing
    Guard(Path(sys.argv[1])).run()
