"""One of our tensors from those of a Hugging Face model in memory, by the family's table: the inverse of `to_hf`."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.hub.names import file_names, groups_of, hf_tensor
from megalite.model.spec import TransformerSpec


def from_hf(spec: TransformerSpec, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """Our full tensor `name`. read: returns a file's tensor by its name there."""
    entry = hf_tensor(spec, name)
    if entry.stacked:
        return torch.stack([read(file_name) for file_name in file_names(entry, spec)])
    tensor = read(entry.name)
    if entry.transposed:
        tensor = tensor.t()
    parts = tensor.unflatten(0, (groups_of(entry, spec), entry.parts, -1))
    return parts[:, entry.part].flatten(0, 1)
