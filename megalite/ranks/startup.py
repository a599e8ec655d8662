"""What every program imports first, for the time in which it imports the rest: program.py's `run_program` ends it.

Ctrl-C is one line and exit code 130, not a traceback; later, signals.py sees to that on ranks. And no garbage is
collected.
"""

import signal

from megalite.ranks.garbage import hold_garbage
from megalite.ranks.signals import interrupted

hold_garbage()
if (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # not where the shell has it ignored
    signal.signal(signal.SIGINT, interrupted)
