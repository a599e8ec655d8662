"""The cut of the layers into chunks, and the pipe rank that holds each chunk; a Stage is built from it.

pipeline/cut.py chooses the best cut. Next: transformer.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Cut:
    """home[c]: the rank that holds chunk c; layers[c]: its layers, in model order. Chunk 0 has the embedding; the last
    chunk has the head and may have no layers."""

    home: tuple[int, ...]
    layers: tuple[range, ...]

    @property
    def last_chunk(self) -> int:
        """The chunk with the head."""
        return len(self.home) - 1

    def chunks_of(self, rank: int) -> list[int]:
        """The chunks that a rank holds."""
        return [chunk for chunk, home in enumerate(self.home) if home == rank]

    @property
    def ends(self) -> tuple[int, ...]:
        """The ranks that hold the embedding and the head: one or two."""
        return tuple(dict.fromkeys((self.home[0], self.home[-1])))


def layers_of(counts: Sequence[int]) -> tuple[range, ...]:
    """The layers of each chunk, given the number of layers in each."""
    stops = list(accumulate(counts))
    return tuple(range(stop - count, stop) for count, stop in zip(counts, stops, strict=True))
