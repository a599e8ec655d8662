"""Signals, and the death of whoever started this rank, as two flags that the training loop reads at a step's end.

Stock `deepspeed` leaves ranks running when its top process or its launcher dies: a rank watches both, and treats
the loss of either as SIGTERM. A thread listens, since the main one may be held up in a collective, where Python's
own handlers do not run. launcher/run.py, where that started the ranks, learns how each ended by a word in a folder.
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
EXIT_BASE = 128  # a process that a signal ended exits with this and the signal's number
LAUNCH = "MEGALITE_LAUNCH"  # names launcher/run.py's folder on this node, for the ranks' last words
AGAIN = "run the same command again"
RESUME = f"{AGAIN} to resume"
_RANKS = (
    "RANK",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
)  # by which a launcher numbers its processes
KILLED = "killed_"  # with a rank's number, a file there: that rank left no word
LOST = "lost"


class Signals:
    """stop: the signal to end for (0: none); save: whether a checkpoint was asked for; peer_lost: launcher/run.py tells
    that a rank or host has failed. Until `defer` a signal to stop ends the process at once: there is nothing to save.
    After the first one further ones are ignored."""

    launcher_lost = False

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self.peer_lost = False
        self.deferred = False
        self.watched = ancestors()
        self.ears, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def defer(self) -> None:
        """From now on a signal to stop only sets `stop`."""
        self.deferred = True

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.ears], [], [], POLL_SECONDS)
            for number in self.ears.recv(64) if ready else b"":
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
                tell_interrupted()
            leave_word(EXIT_BASE + self.stop)
            os._exit(EXIT_BASE + self.stop)


@functools.cache
def listen() -> Signals:
    """This process's listener, started at the first call, which is in the main thread."""
    return Signals()


_last_acts: list[Callable[[], None]] = []


def at_the_end(act: Callable[[], None]) -> None:
    """Has `act` called when this process is about to end by itself or by a signal: `os._exit` skips atexit."""
    _last_acts.append(act)


def interrupted(number: int, frame: object) -> NoReturn:
    """A handler of SIGINT for a process that has nothing to clean up yet."""
    tell_interrupted()
    leave_word(EXIT_BASE + number)
    os._exit(EXIT_BASE + number)


def tell_interrupted(what_next: str = AGAIN) -> None:
    """One line on standard error, of one rank; of none where launcher/run.py has started them, which says it itself."""
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


def leave_word(code: int) -> None:
    """Does the last acts, and tells launcher/run.py, where that started this rank, the code that it is about to end
    with."""
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
    """Those of which launcher/run.py has heard that they ended without a word; none where it did not start this one."""
    names: list[str] = []
    if folder := os.environ.get(LAUNCH):
        with contextlib.suppress(OSError):
            inside = private_folder(folder)
            names = os.listdir(inside)
            os.close(inside)
    return {int(name.removeprefix(KILLED)) for name in names if name.startswith(KILLED)}


def private_folder(path: str) -> int:
    """A descriptor of a folder in which nobody but this user can write, or have written. OSError where it is none: it
    lies in /tmp, where another user could have put a folder or a link of that name."""
    inside = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(inside)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(inside)
        raise PermissionError(
            errno.EPERM, f"belongs to user {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}"
        )
    return inside


def settle(code: int) -> None:
    """This process is about to end with `code`, whatever comes: a launcher that sees one rank end sends the others
    SIGTERM, which would give them another one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    leave_word(code)


def _mute_broken_outputs() -> None:
    """A remote shell that died took the other ends of the outputs with it: a line of progress would end the rank
    before it has saved."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    for output, _ in poll.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def ancestors() -> tuple[int, ...]:
    """The parent, and where that is DeepSpeed's launcher its parent too, which is `deepspeed` or a remote shell.
    When one dies the kernel gives its children another parent, and this changes."""
    parent = os.getppid()
    return (
        (parent, parent_of(parent))
        if b"deepspeed.launcher.launch" in command_of(parent)
        else (parent,)
    )


def command_of(pid: int) -> bytes:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """A process's parent; 0 where it is gone."""
    try:
        # The name in the second field may hold blanks and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0
