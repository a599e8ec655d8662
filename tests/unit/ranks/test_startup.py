"""What programs import first: no garbage is collected until their main begins, and then not of what is there."""

import subprocess
import sys
import textwrap


def test_garbage_is_not_collected_before_main() -> None:
    script = """
        import gc
        import megalite.ranks.startup
        from megalite.ranks.program import run_program

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
    script = "import gc, megalite.ranks.launch, megalite.training.pretrain; print(gc.isenabled())"
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    ).stdout
    assert lines.split() == ["True"]
