"""What the tests of this folder need of a machine: GPUs, and pytest started by tools/test_gpu.sh, since the settings of
the other tests hide them."""

from collections.abc import Callable

import pytest

from megalite.ranks.devices import visible_gpus


@pytest.fixture
def needs() -> Callable[[int], None]:
    """Skips a test where torch sees fewer GPUs than so many."""

    def check(gpus: int) -> None:
        found = visible_gpus()
        if found < gpus:
            pytest.skip(
                f"needs {gpus} GPU{'s' * (gpus > 1)}, sees {found}: for bash tools/test_gpu.sh where they are"
            )

    return check
