"""Between our tensors and those of a Hugging Face file, both ways, from a family's one table.

Ours are never fused and always [out, in]; a file may fuse several along the output features, also head by
head, and may have them transposed. Reading files: import_hf.py; writing them: export_hf.py (tools/).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalite.errors import CheckpointError
from megalite.model.families import FAMILIES
from megalite.model.families.common import HFTensor
from megalite.model.spec import TransformerSpec

_LAYER = re.compile(r"^layers\.(\d+)\.")


def hf_tensor(family: str, name: str) -> HFTensor:
    """Where our full name is in the family's files. CheckpointError for a name that it does not have."""
    match = _LAYER.match(name)
    pattern = _LAYER.sub("layers.{layer}.", name)
    entry: HFTensor | None = FAMILIES[family].TENSORS.get(pattern)
    if entry is None:
        raise CheckpointError(f"{name}: a {family} model has no such tensor")
    return replace(entry, name=entry.name.format(layer=match.group(1) if match else ""))


def from_hf(
    family: str, name: str, read: Callable[[str], Tensor], heads: int | None = None
) -> Tensor:
    """Our full tensor of that name; `read` gives a file's tensor by its name there. heads: of the model, for a
    family that fuses tensors head by head (gpt_neox)."""
    entry = hf_tensor(family, name)
    tensor = read(entry.name)
    if entry.transposed:
        tensor = tensor.t()
    parts = tensor.unflatten(0, (groups_of(entry, heads), entry.parts, -1))
    return parts[:, entry.part].flatten(0, 1)


def to_hf(
    family: str, names: Iterable[str], read: Callable[[str], Tensor], heads: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, one at a time, contiguous; `read` gives our full tensor by its name; heads as above."""
    files: dict[str, dict[int, str]] = {}
    for name in names:
        entry = hf_tensor(family, name)
        files.setdefault(entry.name, {})[entry.part] = name
    for file_name, parts in files.items():
        entry = hf_tensor(family, parts[0])
        tensors = [
            read(parts[part]).unflatten(0, (groups_of(entry, heads), -1)) for part in sorted(parts)
        ]
        tensor = torch.stack(tensors, dim=1).flatten(0, 2)
        yield file_name, (tensor.t() if entry.transposed else tensor).contiguous()


def hf_auto_class(spec: TransformerSpec) -> Any:
    """transformers' class that makes a model of this kind from a config or a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM  # seconds to import

    return AutoModelForCausalLM if spec.causal else AutoModelForMaskedLM


def groups_of(entry: HFTensor, heads: int | None) -> int:
    """Runs of rows that parts are fused by: the heads of a family that fuses head by head, else one."""
    if not entry.by_head:
        return 1
    assert heads is not None, f"{entry.name} is fused head by head: give the number of heads"
    return heads
