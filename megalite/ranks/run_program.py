"""How every program ends: which errors are printed as one line, and the exit code of each."""

import atexit
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
from megalite.ranks.place import RankPlace, place
from megalite.ranks.signals import AGAIN, EXIT_BASE, RESUME, interrupted, settle, tell_interrupted

LINE_CHARACTERS = 1000  # most of an error line


def run_program(main: Callable[[list[str]], int], resumes: bool = False) -> None:
    """Runs a program's main and exits with its code.

    A user's mistake is one line and exit code 2, and so is a file or folder that cannot be created or opened before
    ranks start (a full disk: 1). Ctrl-C is one line and 130. A closed output pipe, as with `| head`, is no line and
    141. resumes: whether the same command, run again, resumes where it was interrupted.
    """
    if signal.getsignal(signal.SIGINT) is interrupted:
        # From now on there may be something to clean up.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a message may repeat a path that is not UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    collect_garbage()
    failed = True
    try:
        code = main(sys.argv[1:])
        failed = False
    except MegaliteError as error:
        code = error.exit_code
        settle(code)
        if _is_told_here(error):
            print_line(error)
        else:
            # A launcher that sees one exit kills the others, and rank 0 must print first.
            time.sleep(1)
    except KeyboardInterrupt:
        settle(EXIT_BASE + signal.SIGINT)
        tell_interrupted(RESUME if resumes else AGAIN)
        sys.stdout.flush()
        os._exit(EXIT_BASE + signal.SIGINT)  # without waiting for threads that are inside a library
    except OSError as error:
        code = _tell_system_error(error)
    except Exception:
        code = 1
        settle(code)
        _raise_or_tell()
    else:
        settle(code)
    code = _flush(code, is_result=not resumes)
    if failed and RankPlace.started:
        # Skips the interpreter's shutdown, where NCCL would wait for the other ranks of each group.
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _tell_system_error(error: OSError) -> int:
    """Settles and prints an error of the system; returns the exit code."""
    is_full = error.errno in FULL
    code = 1 if is_full or error.filename is None or RankPlace.started else UserError.exit_code
    if isinstance(error, BrokenPipeError) and _is_output_closed():
        code = EXIT_BASE + signal.SIGPIPE
    settle(code)
    if code == 1 and not is_full:
        _raise_or_tell()
    elif code in (1, UserError.exit_code):
        line = f"{error.filename or 'a file'}: {error.strerror}"
        print_line(MegaliteError(line).with_traceback(error.__traceback__))
    return code


def _flush(code: int, is_result: bool) -> int:
    """Flushes the standard streams; returns the exit code. is_result: whether standard output is the program's result;
    on a full disk a run may lose the last lines of its log."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and error.errno in FULL and code == 0 and is_result:
                print_line(MegaliteError(f"standard output: {error.strerror}"))
                code = 1
    return code


def _raise_or_tell() -> None:
    """For an unexpected error: raises it again, or prints it in a rank, which exits without raising."""
    if not RankPlace.started:
        raise
    traceback.print_exc()


def _is_told_here(error: MegaliteError) -> bool:
    """Whether this process prints an error: only rank 0 prints those that all ranks raise."""
    try:
        return not error.agreed or place().rank == 0
    except UserError:  # the environment is what is wrong
        return True


def _is_output_closed() -> bool:
    """Whether standard output is a pipe whose reader has closed it."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in output.poll(0))


def program_name() -> str:
    """The prefix of lines on standard error: `pretrain.py`, or `megalite pretrain`."""
    return os.path.basename(sys.argv[0])


def print_line(error: Exception) -> None:
    """Prints an error to standard error as one line, or as one line for each mistake of a UserError; with
    MEGALITE_TRACEBACK=1 the traceback comes first."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    for text in error.lines if isinstance(error, UserError) else [str(error)]:
        line = " ".join(text.split())
        if len(line) > LINE_CHARACTERS:
            # Cut a long path or value in the middle: the rule that it breaks is at the end.
            line = f"{line[: LINE_CHARACTERS // 2]} … {line[-LINE_CHARACTERS // 2 :]}"
        with contextlib.suppress(OSError):  # the terminal is gone or the disk is full
            print(f"{program_name()}: {line}", file=sys.stderr, flush=True)
