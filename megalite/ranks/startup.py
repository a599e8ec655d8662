"""Every program imports this module first. It covers the time of the other imports, until `run_program`
(run_program.py).

Until then, Ctrl-C prints one line and exits with 130, without a traceback, and garbage collection is off. Later,
signals.py handles Ctrl-C on ranks.
"""

import signal

from megalite.ranks.garbage import hold_garbage
from megalite.ranks.signals import interrupted
from megalite.ranks.standard_streams import open_closed_streams

open_closed_streams()
hold_garbage()
# The shell may have set SIGINT to be ignored: leave that as it is.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
