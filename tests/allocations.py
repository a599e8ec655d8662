"""Memory that torch allocates."""

from megalite.prove.allocations import peak_bytes as peak_bytes
