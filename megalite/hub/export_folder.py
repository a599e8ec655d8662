"""Exports our checkpoint to a Hugging Face folder, tensor by tensor. The reverse: import_folder.py.

Memory: three copies of the largest tensor of the files (its parts, the whole, its bytes), whatever the model's size;
`verify` needs more (same_logits.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.files import ROUTER_BIAS, Checkpoint, find_checkpoint
from megalite.data.progress import counted
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import CheckpointError
from megalite.hub.carried import (
    CARRIED,
    GENERATION,
    carry,
    stop_ids_of,
    tokenizer_files,
    tokenizer_of,
)
from megalite.hub.names import (
    bias_names,
    biases_to_hf,
    file_names,
    hf_auto_class,
    hf_tensor,
    to_hf,
)
from megalite.hub.same_logits import Comparison, compare
from megalite.hub.shards import FileShard, plan_shards, write_index, write_shards
from megalite.hub.sources import prompts_both_ways
from megalite.hub.whole import appearing
from megalite.inputs import reading
from megalite.model.families import PREFIX_LM, config_of, read_spec
from megalite.model.spec import TransformerSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's weights in the form of the family's files."""

    checkpoint: Checkpoint
    spec: TransformerSpec
    dtype: torch.dtype

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the files, in the order of `tensors`."""
        result = {}
        for name in self.checkpoint.names:
            entry, shape = hf_tensor(self.spec, name), self.checkpoint.shape(name)
            if entry.stacked:
                result |= dict.fromkeys(file_names(entry, self.spec), shape[1:])
                continue
            shape = (shape[0] * entry.parts, *shape[1:])
            result.setdefault(entry.name, shape[::-1] if entry.transposed else shape)
        return result

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        made = to_hf(self.spec, self.checkpoint.names, self.checkpoint.read)
        for name, tensor in counted(made, len(self.shapes()), "tensors written"):
            if self.dtype == torch.float16 and not torch.isfinite(tensor.half()).all():
                raise CheckpointError(
                    f"--dtype: float16: {name}: largest value {tensor.abs().max().item():.3g} "
                    "overflows float16: use bfloat16"
                )
            yield name, tensor.to(self.dtype)


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = "float32",
    verify: bool | None = None,
) -> Comparison | None:
    """Writes safetensors files with an index if there are several, config.json, generation_config.json and the
    tokenizer's files. The folder appears once everything is written and verified, or not at all.

    verify, result and errors: as in `import_hf`.
    """
    with appearing(output, CheckpointError) as partial:
        source = Checkpoint.open(find_checkpoint(checkpoint))
        weights = _Weights(source, read_spec(source.model), DTYPES[dtype])
        if ROUTER_BIAS in source.state and not bias_names(weights.spec):
            family = weights.spec.family
            rule = f'the files of {family} models cannot store the biases of megalite.train.router.balance "bias"'
            raise CheckpointError(f"{source.folder}: {ROUTER_BIAS}: {rule}")
        with reading(source.folder, CheckpointError):
            biases = dict(biases_to_hf(weights.spec, source.state))
        partial.mkdir()
        # fp32 tensors come first, because readers need tensors aligned to the size of their numbers.
        wide = {name: (tuple(value.shape), value.dtype) for name, value in biases.items()}
        others = {name: (shape, weights.dtype) for name, shape in weights.shapes().items()}
        shards: list[FileShard] = plan_shards(wide | others, SHARD_BYTES)
        write_shards(partial, shards, chain(biases.items(), weights.tensors()))
        write_index(partial, shards)
        with reading(source.folder, CheckpointError):
            _write_settings(source, weights.spec, partial, dtype)
        return compare(source.folder, partial, verify, weights.dtype)


def _write_settings(source: Checkpoint, spec: TransformerSpec, folder: Path, dtype: str) -> None:
    """Writes the config with the model's class and dtype, a decoder's generation settings, the tokenizer's files."""
    from transformers import GenerationConfig

    values: dict[str, Any] = {**source.model, "dtype": dtype}
    model_type = values.pop("model_type")
    config = config_of(model_type, values)
    if prompts_both_ways(source.state):
        setattr(config, PREFIX_LM, True)
    config.architectures = [hf_auto_class(spec)._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    carry(source.folder / CARRIED, folder)
    tokenizer = tokenizer_of(source)
    if tokenizer is not None:
        carry(tokenizer, folder)
    if spec.causal and not (folder / GENERATION).exists():
        generation = GenerationConfig.from_model_config(config)
        if spec.start_id is not None:
            generation.decoder_start_token_id = spec.start_id
        generation.eos_token_id = _ends_of(source, spec, folder)
        generation.save_pretrained(folder)


def _ends_of(source: Checkpoint, spec: TransformerSpec, folder: Path) -> int | list[int] | None:
    """The tokens at which generation here ends a text. The config of an older checkpoint may have its family's default,
    which need not be in the vocabulary. folder: of the export, with the tokenizer's files."""
    ends = stop_ids_of(source)
    if next(tokenizer_files(folder), None) is not None:
        end = load_tokenizer(folder).eod_id
        ends |= set() if end is None else {end}
    known = sorted(number for number in ends if number < spec.vocabulary_size)
    return known[0] if len(known) == 1 else known or None
