"""Turns off Python's garbage collection while a program starts.

Imports and building a model create a million objects that stay alive. The collector would walk through them hundreds of
times during the start, which takes 0.5 of a rank's 4.5 seconds, and again now and then in training, for a quarter of a
second in which other ranks wait.
"""

import gc


def hold_garbage() -> None:
    """Turns collection off until `collect_garbage`, while long-lived objects are created."""
    gc.disable()


def collect_garbage() -> None:
    """Turns collection on again, only for objects created from now on."""
    gc.freeze()
    gc.enable()
