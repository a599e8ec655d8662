"""Keeps the copies of a weight along the tensor axis equal on GPUs.

Norms, biases of row linears and routers are whole on every rank of the tensor axis, and a key/value head is on several
ranks if there are fewer heads than ranks. Each tensor rank sums their gradients over the data axis in a communicator of
its own. gloo adds in the same order in all of them; NCCL does not promise that (NVIDIA/nccl#2091), and copies that
differ by rounding would drift apart, until routers send one token to different experts. So before each update all ranks
take the gradients of the first rank with the copy. Next: zero.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.engine.norm import Pieces
from megalite.parallel.grid import Axis
from megalite.parallel.layers import Placement


def copies_of(placement: Placement, size: int) -> int:
    """Number of neighbouring ranks of the tensor axis, of `size` ranks, that hold the same slice of a tensor."""
    for axis, dim, start, stop, parts in placement.cuts:
        if axis == "tensor":
            # More than one if there are fewer key/value heads than ranks. Uneven parts differ by one element.
            return max(1, parts * (stop - start) // placement.full_shape[dim])
    return size


def may_differ(device: torch.device) -> bool:
    """Whether the gradients of copies may differ: whether messages are NCCL's."""
    return device.type != "cpu"


def take_gradients_of_first(tensor: Axis, device: torch.device, pieces: Pieces) -> None:
    """Replaces the gradients of copies by those of the first rank that holds them, in place: one message, and one for
    shared key/value heads (collective over the tensor axis).

    pieces: copies have the same ZeRO shards on all ranks of the axis. device: of messages.
    """
    shared: dict[int, list[Tensor]] = {}
    for placement, gradient in pieces:
        copies = copies_of(placement, tensor.size)
        if copies > 1 and gradient.numel():
            shared.setdefault(copies, []).append(gradient)
    for copies, gradients in sorted(shared.items()):
        axis = tensor.run(copies)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(device)
        dist.broadcast(flat, axis.ranks[0], group=axis.group)
        if axis.rank > 0:
            parts = flat.split([gradient.numel() for gradient in gradients])
            received = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, received)  # type: ignore[attr-defined]
