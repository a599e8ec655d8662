"""Whether the axis that talks most stays within a node. Ranks are numbered host by host, tensor innermost (grid.py)."""

from collections.abc import Sequence


def crossing_hosts(hosts: Sequence[str], tensor: int) -> str | None:
    """A line that names the first group of the tensor axis that does not lie on one host; hosts: of each rank."""
    for first in range(0, len(hosts), tensor):
        group = hosts[first : first + tensor]
        if len(set(group)) > 1:
            names = ", ".join(dict.fromkeys(group))
            return (
                f"megalite.parallel.tensor {tensor}: ranks {first} to {first + tensor - 1} are on {names}: every layer "
                f"waits for the network; a divisor of each host's ranks keeps the tensor axis within a host"
            )
    return None
