"""Signals, and the death of the process that started this rank, as flags that the training loop reads after each step.

Stock `deepspeed` leaves ranks running when its top process or its launcher dies, so a rank watches both and treats the
loss of either as SIGTERM. A thread listens, since the main thread may be blocked in a collective, where Python's signal
handlers do not run. If launcher/run.py started the ranks, each writes its exit code to a file in a folder for it.
"""

import contextlib
import errno
import functools
import os
import select
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

POLL_SECONDS = 0.5
EXIT_BASE = 128  # a process ended by a signal exits with this plus the signal's number
LAUNCH = "MEGALITE_LAUNCH"  # names launcher/run.py's folder on this node, for the ranks' exit codes
AGAIN = "run the same command again"
RESUME = f"{AGAIN} to resume"
# Variables in which launchers pass the rank.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# With a rank's number, a file in that folder: the rank ended without its exit code.
KILLED = "killed_"
LOST = "lost"


class Signals:
    """The signals that this process has received.

    stop: the signal to end for (0: none). save: whether a checkpoint was requested. peer_lost: launcher/run.py reported
    that a rank or host has failed. Before `defer`, a signal to stop ends the process at once, since there is nothing to
    save. After the first signal to stop, further ones are ignored.
    """

    launcher_lost = False

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self.peer_lost = False
        self.deferred = False
        self.watched = ancestors()
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def defer(self) -> None:
        """From now on, a signal to stop only sets `stop`."""
        self.deferred = True

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.receiver], [], [], POLL_SECONDS)
            for number in self.receiver.recv(64) if ready else b"":
                if number == signal.SIGUSR1:
                    self.save = True
                elif number == signal.SIGUSR2:
                    self.peer_lost = True
                else:
                    self._end_for(number)
            if not self.stop and ancestors() != self.watched:
                Signals.launcher_lost = True
                _mute_broken_outputs()
                self._end_for(signal.SIGTERM)

    def _end_for(self, number: int) -> None:
        self.stop = self.stop or int(number)
        if not self.deferred:
            if self.stop == signal.SIGINT:
                print_interrupted()
            record_exit(EXIT_BASE + self.stop)
            os._exit(EXIT_BASE + self.stop)


@functools.cache
def listen() -> Signals:
    """This process's listener. The first call starts it and must be in the main thread."""
    return Signals()


_last_acts: list[Callable[[], None]] = []


def at_the_end(act: Callable[[], None]) -> None:
    """Registers `act` to be called before this process ends, by itself or by a signal: `os._exit` skips atexit."""
    _last_acts.append(act)


def interrupted(number: int, frame: object) -> NoReturn:
    """Handler of SIGINT for a process that has nothing to clean up yet."""
    print_interrupted()
    record_exit(EXIT_BASE + number)
    os._exit(EXIT_BASE + number)


def print_interrupted(what_next: str = AGAIN) -> None:
    """Prints one line on standard error, on rank 0 only. If launcher/run.py started the ranks, it prints it instead."""
    if (
        LAUNCH not in os.environ
        and next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"
    ):
        with contextlib.suppress(OSError):
            print(
                f"{os.path.basename(sys.argv[0])}: interrupted: {what_next}",
                file=sys.stderr,
                flush=True,
            )


def record_exit(code: int) -> None:
    """Calls what `at_the_end` registered and, if launcher/run.py started this rank, leaves it the exit code."""
    for act in _last_acts:
        act()
    if folder := os.environ.get(LAUNCH):
        with contextlib.suppress(OSError):
            word = f"{code} {LOST}" if Signals.launcher_lost else f"{code}"
            inside = private_folder(folder)
            name, flags = (
                f"rank_{os.environ.get('RANK', '0')}",
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
            )
            with open(os.open(name, flags, 0o600, dir_fd=inside), "w") as file:
                file.write(word)
            os.close(inside)


def killed_ranks() -> set[int]:
    """Ranks that ended without leaving an exit code, as reported by launcher/run.py; none if it did not start them."""
    names: list[str] = []
    if folder := os.environ.get(LAUNCH):
        with contextlib.suppress(OSError):
            inside = private_folder(folder)
            names = os.listdir(inside)
            os.close(inside)
    return {int(name.removeprefix(KILLED)) for name in names if name.startswith(KILLED)}


def private_folder(path: str) -> int:
    """A file descriptor of a folder that only this user can write to. Raises OSError for any other folder or a link:
    the path is in /tmp, where another user could have created it."""
    inside = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(inside)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(inside)
        raise PermissionError(
            errno.EPERM, f"belongs to user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}"
        )
    return inside


def settle(code: int) -> None:
    """Fixes this process's exit code before it ends: a launcher that sees one rank end sends SIGTERM to the others,
    which would change their codes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    record_exit(code)


def _mute_broken_outputs() -> None:
    """Redirects outputs whose pipe is broken to /dev/null. When a remote shell dies, its pipes close, and printing
    progress would end the rank before it has saved."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    for output, _ in poll.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def ancestors() -> tuple[int, ...]:
    """The parent's pid; if the parent is DeepSpeed's launcher, also its parent's, `deepspeed` or a remote shell. The
    result changes when one of them dies, because the kernel then gives its children another parent."""
    parent = os.getppid()
    return (
        (parent, parent_of(parent))
        if b"deepspeed.launcher.launch" in command_of(parent)
        else (parent,)
    )


def command_of(pid: int) -> bytes:
    """A process's command line; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """The pid of a process's parent; 0 if the process is gone."""
    try:
        # The name in the second field may contain spaces and parentheses.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
