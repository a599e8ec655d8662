"""Signals that a rank handles."""

import signal
import subprocess
import sys


def test_a_settled_exit_code_is_kept() -> None:
    code = "import time; from megalite.ranks.signals import *; listen(); settle(0); print(flush=True); time.sleep(0.5)"
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline() == b"\n"
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(5) == 0
