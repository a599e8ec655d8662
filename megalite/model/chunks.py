"""How the layers are cut into chunks, and which rank of the pipe axis holds each: what a Stage is built by.

Which cut is best is not told here (pipeline/cut.py). Next: transformer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Cut:
    """home[c]: the rank that holds chunk c; layers[c]: its layers, in the order of the model. Chunk 0 has the
    embedding, the last one the head, which may have no layer."""

    home: tuple[int, ...]
    layers: tuple[range, ...]

    @property
    def last_chunk(self) -> int:
        """The one that has the head."""
        return len(self.home) - 1

    def chunks_of(self, rank: int) -> list[int]:
        """The chunks that a rank holds."""
        return [chunk for chunk, home in enumerate(self.home) if home == rank]

    @property
    def ends(self) -> tuple[int, ...]:
        """The ranks that hold embedding and head: one or two."""
        return tuple(dict.fromkeys((self.home[0], self.home[-1])))


def layers_of(counts: Sequence[int]) -> tuple[range, ...]:
    """The layers of chunks that have so many."""
    stops = list(accumulate(counts))
    return tuple(range(stop - count, stop) for count, stop in zip(counts, stops, strict=True))
