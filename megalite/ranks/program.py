"""How every program ends: which errors are one line, and with which exit code."""

import contextlib
import io
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

from megalite.errors import MegaliteError, UserError
from megalite.inputs import FULL, TRACEBACK
from megalite.ranks.garbage import collect_garbage
from megalite.ranks.place import Place, place
from megalite.ranks.signals import AGAIN, EXIT_BASE, RESUME, interrupted, settle, tell_interrupted

LINE_CHARACTERS = 1000  # of an error


def run_program(main: Callable[[list[str]], int], resumes: bool = False) -> None:
    """Runs a program's main and ends the process with its code: a user's mistake is one line and 2, and so is a file
    or folder that cannot be made or opened before ranks work (a full disk: 1); Ctrl-C is one line and 130; a reader of
    its output that has gone, as of `| head`, is no line and 141. resumes: whether the same command then continues
    where it was."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # there may be something to clean up from now on
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8, and may be repeated
        sys.stdout.reconfigure(errors="backslashreplace")
    collect_garbage()
    try:
        code = main(sys.argv[1:])
    except MegaliteError as error:
        code = error.exit_code
        settle(code)
        if _is_told_here(error):
            print_line(error)
        else:
            time.sleep(
                1
            )  # a launcher that sees one exit kills the others, and rank 0 is to print first
    except KeyboardInterrupt:
        settle(EXIT_BASE + signal.SIGINT)
        tell_interrupted(RESUME if resumes else AGAIN)
        sys.stdout.flush()
        os._exit(EXIT_BASE + signal.SIGINT)  # not after threads that are deep in a library
    except OSError as error:
        is_full = error.errno in FULL
        code = 1 if is_full or error.filename is None or Place.started else UserError.exit_code
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            code = EXIT_BASE + signal.SIGPIPE
        settle(code)
        if code == 1 and not is_full:
            raise
        if code in (1, UserError.exit_code):
            print_line(
                MegaliteError(f"{error.filename or 'a file'}: {error.strerror}").with_traceback(
                    error.__traceback__
                )
            )
    except Exception:
        settle(1)
        raise
    else:
        settle(code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            # A full disk costs a run the last lines of its log; of other programs standard output is the result.
            if stream is sys.stdout and error.errno in FULL and code == 0 and not resumes:
                print_line(MegaliteError(f"standard output: {error.strerror}"))
                code = 1
    sys.exit(code)


def _is_told_here(error: MegaliteError) -> bool:
    """Whether this process prints an error: of those that all ranks raise, rank 0 alone."""
    try:
        return not error.agreed or place().rank == 0
    except UserError:  # of an environment that names no rank
        return True


def _is_output_closed() -> bool:
    """Whether nobody reads standard output any more: a pipe without a reader is in error."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in output.poll(0))


def program_name() -> str:
    """What lines on standard error begin with: `pretrain.py`, or `megalite pretrain`."""
    return os.path.basename(sys.argv[0])


def print_line(error: Exception) -> None:
    """An error as one line on standard error, or one for each mistake of a user's; with MEGALITE_TRACEBACK=1 after
    where it was raised."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    for text in error.lines if isinstance(error, UserError) else [str(error)]:
        line = " ".join(text.split())
        if (
            len(line) > LINE_CHARACTERS
        ):  # a path or a value of thousands: what is said of it is at the end
            line = f"{line[: LINE_CHARACTERS // 2]} … {line[-LINE_CHARACTERS // 2 :]}"
        with contextlib.suppress(OSError):  # a terminal that is gone, a full disk: nobody hears it
            print(f"{program_name()}: {line}", file=sys.stderr, flush=True)
