"""When Python collects garbage: not while a program starts.

Imports and building a model make a million objects that stay. Collections would walk through them hundreds of times
meanwhile, in 0.5 of the 4.5 seconds that a rank takes to start, and now and then later, for a quarter of a second in
which other ranks wait.
"""

import gc


def hold_garbage() -> None:
    """Collects none until `collect_garbage`, while objects are made that stay."""
    gc.disable()


def collect_garbage() -> None:
    """From now on, of what is made from now on."""
    gc.freeze()
    gc.enable()
