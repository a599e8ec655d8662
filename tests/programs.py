"""Runs a program of this repository in a separate process, but without its seconds of imports: `run_program`.

The process is a fork of the server of tests/ranks.py, which has imported everything, and does the same as
`python FILE WORDS`: the file runs as `__main__`, with its own streams, folder, environment and exit code. Tests of the
start itself (imports, launchers, interrupts) start Python instead.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.ranks import CONTEXT, REPOSITORY, die_with_parent, start_server

STREAMS = ("stdin", "stdout", "stderr")


def run_program(
    program: str,
    *words: str,
    folder: Path = REPOSITORY,
    stdin: str = "",
    timeout_seconds: float = 200,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """The result of `python PROGRAM WORDS` in `folder`, with `variables` added to its environment. program: a path in
    the repository, or "megalite" for `python -m megalite`. Raises subprocess.TimeoutExpired."""
    start_server()
    with tempfile.TemporaryDirectory(prefix="program_") as streams:
        files = [Path(streams, name) for name in STREAMS]
        files[0].write_text(stdin)
        arguments = program, words, folder, os.environ | variables, files
        process = CONTEXT.Process(target=_program_main, args=arguments)
        process.start()
        process.join(timeout_seconds)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            raise subprocess.TimeoutExpired([program, *words], timeout_seconds)
        out, err = (file.read_text(errors="replace") for file in files[1:])
        return subprocess.CompletedProcess([program, *words], process.exitcode, out, err)


def _program_main(
    program: str, words: list[str], folder: Path, environment: dict[str, str], files: list[Path]
) -> None:
    """The main function of the process; multiprocessing exits with the code of its SystemExit, or a traceback and 1."""
    die_with_parent()
    os.setsid()  # so that its child processes can be killed together with it
    for number, file in enumerate(files):
        stream = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(environment, PYTHONPATH=str(REPOSITORY))
    os.chdir(folder)
    atexit._clear()  # the hooks of the server, not of the program
    try:
        if program.endswith(".py"):
            file = REPOSITORY / program
            sys.argv = [str(file), *words]
            sys.path.insert(0, str(file.parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = [program, *words]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
