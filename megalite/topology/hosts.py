"""Whether each tensor group stays within one host. Ranks are numbered host by host, tensor innermost (axes.py)."""

from collections.abc import Sequence


def crossing_hosts(hosts: Sequence[str], tensor: int) -> str | None:
    """A warning that names the first tensor group that spans hosts; None if there is none. hosts: each rank's host."""
    for first in range(0, len(hosts), tensor):
        group = hosts[first : first + tensor]
        if len(set(group)) > 1:
            names = ", ".join(dict.fromkeys(group))
            return (
                f"megalite.parallel.tensor {tensor}: ranks {first} to {first + tensor - 1} are on {names}: every layer "
                f"waits for the network; to stay within a host, tensor must divide the number of ranks on each host"
            )
    return None
