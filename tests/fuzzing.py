"""Helpers for tests with forged inputs: odd values, changes of a good document, and the property of a reader.

The property: any input is either accepted, or refused with a `UserError` of one line; nothing else is raised, and it
takes at most `MOST_SECONDS` of this process's CPU time.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.errors import UserError

MOST_SECONDS = 20.0  # of CPU time: only a hang takes this long
DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63 - 1, -(2**63), 10**21, 10**400, 0.0, -0.0, 0.5, 1e-320,
    1e300, float("inf"), float("nan"), "", "x", "1", "0" * 5000, "a/" * 300, "\0", "\ud800", "é漢🙂", "../x",
    "/dev/null", [], {}, [[]], [0], ["x"], {"": 0}, {"type": {}}, DEEP,
]  # fmt: skip

odd: Any = st.sampled_from(ODD).map(copy.deepcopy)
anything: Any = st.recursive(
    odd | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


EXAMPLES = [
    pytest.param(40, id="short"),
    pytest.param(2000, id="long", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
]
"""Number of inputs for a property, for `pytest.mark.parametrize("examples", EXAMPLES)`."""


def holds(
    read: Callable[[Any], Any], inputs: Any, examples: int, *passing: type[BaseException]
) -> None:
    """Checks the property of a reader on drawn inputs: always the same in the short form, new ones in the long form."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(inputs)
    def property_(value: Any) -> None:
        refused_or_taken(lambda: read(value), *passing)

    property_()


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a JSON value, including itself."""
    found = [path]
    if isinstance(document, dict | list):
        for key, inner in document.items() if isinstance(document, dict) else enumerate(document):
            found += paths_of(inner, (*path, key))
    return found


@st.composite
def changed(draw: Any, document: Any, most: int = 3) -> Any:
    """A good JSON value with some of its parts replaced, removed or added."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(paths_of(result)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                result = draw(anything)
            continue
        holder = result
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                holder[path[-1]] = draw(odd | anything)
            case "remove":
                del holder[path[-1]]
            case _ if isinstance(holder, dict):
                holder[draw(st.text(max_size=6))] = draw(anything)
            case _:
                holder.insert(0, draw(anything))
    return result


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Good bytes with some changed, cut off or inserted."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(result) - 1)))
        match draw(st.sampled_from(["flip", "flip", "number", "cut", "insert"])):
            case "flip" if result:
                result[place] ^= 1 << draw(st.integers(0, 7))
            case "number":
                number = draw(
                    st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1])
                )
                width = draw(st.sampled_from([4, 8]))
                result[place : place + width] = (number % 2 ** (8 * width)).to_bytes(
                    width, "little"
                )
            case "cut":
                del result[place:]
            case _:
                result[place:place] = draw(st.binary(min_size=1, max_size=9))
    return bytes(result)


def refused_or_taken(read: Callable[[], Any], *passing: type[BaseException]) -> UserError | None:
    """Reads; returns the error if the input was refused. passing: other errors that may be raised."""
    start = time.process_time()
    error = None
    try:
        read()
    except UserError as raised:
        error = raised
    except passing:
        pass
    seconds = time.process_time() - start
    assert seconds < MOST_SECONDS, f"took {seconds:.0f} s: {error}"
    if error is not None:
        assert error.exit_code == 2 and str(error).split(), error
    return error
