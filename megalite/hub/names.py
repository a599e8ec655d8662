"""Maps our tensors to those of Hugging Face files and back, by the table of each family.

Our tensors are never fused and always [out, in], and experts are stacked, [E, out, in]. A file may fuse several of
ours along the output features, possibly head by head, may transpose them, and has a separate tensor for each expert.
hf_folder.py reads files; export_folder.py writes them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.files import ROUTER_BIAS
from megalite.checkpoint.saved_bias import bias_of
from megalite.errors import CheckpointError
from megalite.model.families import FAMILIES
from megalite.model.families.classifiers import tensors_of
from megalite.model.families.common import HFTensor
from megalite.model.spec import TransformerSpec

_LAYER = re.compile(r"^layers\.(\d+)\.")


def hf_tensor(spec: TransformerSpec, name: str) -> HFTensor:
    """The location of a tensor, by our full name, in the family's files. Raises CheckpointError for an unknown name."""
    match = _LAYER.match(name)
    pattern = _LAYER.sub("layers.{layer}.", name)
    family = FAMILIES[spec.family]
    layer, table = int(match.group(1)) if match else None, family.tensors
    if layer is not None and family.tensors_of_layer is not None:
        table, layer = family.tensors_of_layer(spec, layer)
    entry = table.get(pattern) or tensors_of(spec.family).get(name)
    if entry is None:
        raise CheckpointError(f"{name}: a {spec.family} model has no such tensor")
    return replace(entry, name=entry.name.replace("{layer}", str(layer)))


def to_hf(
    spec: TransformerSpec, names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, one at a time, contiguous. read: returns our full tensor by its name."""
    files: dict[str, dict[int, str]] = {}
    for name in names:
        entry = hf_tensor(spec, name)
        files.setdefault(entry.name, {})[entry.part] = name
    for file_name, parts in files.items():
        entry = hf_tensor(spec, parts[0])
        if entry.stacked:
            yield from zip(file_names(entry, spec), read(parts[0]), strict=True)
            continue
        tensors = [
            read(parts[part]).unflatten(0, (groups_of(entry, spec), -1)) for part in sorted(parts)
        ]
        tensor = torch.stack(tensors, dim=1).flatten(0, 2)
        yield file_name, (tensor.t() if entry.transposed else tensor).contiguous()


def bias_names(spec: TransformerSpec) -> list[str]:
    """Names in the files of the biases [1, E] for choosing experts, one per layer with experts; none if the family's
    files do not store them."""
    pattern = FAMILIES[spec.family].router_bias
    if pattern is None or spec.mixture is None:
        return []
    return [pattern.replace("{layer}", str(layer)) for layer in spec.mixture.layers]


def state_of(spec: TransformerSpec, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """The biases as part of a checkpoint's state; empty if all are 0. read: returns a file's tensor by its name
    there."""
    rows = [read(name).float().flatten() for name in bias_names(spec)]
    return {ROUTER_BIAS: [row.tolist() for row in rows]} if any(row.any() for row in rows) else {}


def biases_to_hf(spec: TransformerSpec, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `state_of`: the files' bias tensors, always fp32."""
    names, mixture = bias_names(spec), spec.mixture
    values = None if mixture is None else bias_of(state, mixture)
    if values is None:
        values = torch.zeros(len(names), spec.experts)
    for name, row in zip(names, values, strict=True):
        yield name, row.unsqueeze(0)


def hf_auto_class(spec: TransformerSpec) -> Any:
    """The auto class of transformers for a model of this kind."""
    from transformers import (  # takes seconds to import
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    if spec.classifier is not None:
        return AutoModelForSequenceClassification
    if spec.stacks is not None:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if spec.causal else AutoModelForMaskedLM


def groups_of(entry: HFTensor, spec: TransformerSpec) -> int:
    """Number of groups of rows in a fused tensor: the heads if the family fuses head by head, else 1."""
    return spec.num_heads if entry.by_head else 1


def file_names(entry: HFTensor, spec: TransformerSpec) -> list[str]:
    """Names of the file's tensors for one of our tensors: one, or one for each expert."""
    if not entry.stacked:
        return [entry.name]
    assert spec.mixture is not None
    return [entry.of_expert(number) for number in range(spec.mixture.count)]
