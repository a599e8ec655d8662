"""Delaying garbage collection while long-lived objects are created."""

import gc
import weakref

from megalite.ranks.garbage import collect_garbage, hold_garbage


class Loop:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.self = self


def test_older_objects_are_not_scanned() -> None:
    try:
        hold_garbage()
        before = weakref.ref(Loop())
        collect_garbage()
        after = weakref.ref(Loop())
        gc.collect()
        assert before() is not None and after() is None
    finally:
        gc.unfreeze()
        gc.collect()
