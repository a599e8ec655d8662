"""What every program imports first: Ctrl-C while it imports the rest is one line and exit code 130, not a traceback.

From then on launch.py's `run_program` sees to that, and on ranks signals.py.
"""

import signal

from megalite.ranks.signals import interrupted

if (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # not where the shell has it ignored
    signal.signal(signal.SIGINT, interrupted)
