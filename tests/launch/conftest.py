"""A start that leaves nothing behind, however its test ends."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Cluster, require_hosts
from tests.launch.starts import Start, shared_memory


@pytest.fixture
def start() -> Iterator[Callable[..., Start]]:
    """`Start`, with what is left killed at the test's end and shared memory looked at."""
    started: list[Start] = []
    before = shared_memory()

    def make(*args: object, **kwargs: object) -> Start:
        started.append(Start(*args, **kwargs))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for one in started:
        one.kill()
    assert shared_memory() <= before, "DeepSpeed's shared-memory op left its buffers"


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two hosts, or as many as the test's parameter says."""
    require_hosts()
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder, getattr(request, "param", 2))
    yield made
    made.close()
