"""The module that programs import first: it delays garbage collection until main starts, and excludes older objects."""

import subprocess
import sys
import textwrap
from pathlib import Path


def test_garbage_is_not_collected_before_main() -> None:
    script = """
        import gc
        import megalite.ranks.startup
        from megalite.ranks.run_program import run_program

        def main(arguments):
            print(gc.isenabled(), gc.get_freeze_count() > 10_000)
            return 0

        print(gc.isenabled())
        run_program(main)
    """
    lines = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    ).stdout
    assert lines.split() == ["False", "True", "True"]


def test_a_library_leaves_the_collector_alone() -> None:
    script = (
        "import gc, megalite.ranks.launch, megalite.training.pretraining; print(gc.isenabled())"
    )
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    ).stdout
    assert lines.split() == ["True"]


def test_what_libraries_print_to_a_closed_stream_is_not_written_into_a_file(tmp_path: Path) -> None:
    """The next file to be opened would get the closed stream's descriptor."""
    script = """if True:
        import os, sys
        import megalite.ranks.startup
        from megalite.ranks.run_program import run_program

        def main(arguments):
            with open(arguments[0], "wb") as file:
                os.write(1, b"of a library")
                os.write(2, b"of a library")
                file.write(b"data")
            print(len(sys.stdin.read()))
            return 0

        run_program(main)
    """
    file = tmp_path / "file"
    command = 'exec "$@" <&- >&- 2>&-'
    words = ["sh", "-c", command, "sh", sys.executable, "-c", script, str(file)]
    assert subprocess.run(words, timeout=60).returncode == 0
    assert file.read_bytes() == b"data"
