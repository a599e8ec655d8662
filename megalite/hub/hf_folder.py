"""Reads a Hugging Face folder under our names, lazily: a tensor, or one box of it, directly from its file.

Opening a folder reads `config.json` and the files' headers, and compares them with the model: a tensor that is missing,
has another shape or is unknown is an error. Reading a box reads only its bytes. The family's table (names.py) says
which tensors are fused or transposed in the files.

R rows of our tensor. If the file fuses P of our tensors in groups (heads, or one group), our row j of group g is row
(g·P + part)·R/groups + j of the file's tensor.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite import other_formats
from megalite.config import Classified
from megalite.errors import CheckpointError
from megalite.hub.names import bias_names, file_names, groups_of, hf_tensor, state_of
from megalite.inputs import check_links, read_json_object, reading
from megalite.model.families import FAMILIES, PREFIX_LM, model_dict, read_spec
from megalite.model.families.common import HFTensor
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import TIED_NAME, Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import placed

# Buffers that older releases of transformers saved; they are computed, not trained.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.\w+|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
# Names of a norm's weight and bias in TensorFlow's original BERT; transformers reads them too.
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
_LARGEST = torch.finfo(torch.float32).max
_FLOATS = ("F64", "F32", "F16", "BF16")
HEAD = "head.weight"
# The data section of a run that trained with the objective "prefix".
_PROMPTS = {
    "samples": "padded",
    "loss": "marked",
    "objective": "prefix",
    "reset_attention": True,
    "eod_mask_loss": False,
}
_OF_HEADS = ("classifier.", "head.")


def full_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, tied ones once; takes no memory."""
    with torch.device("meta"):
        return {place.name: place.full_shape for _, place in placed(Stage(spec, Grid()))}


class HFFolder:
    """An open folder, with the interface of a Checkpoint: model, names, shape, read, state. Raises CheckpointError or
    ConfigError if the folder is incomplete or invalid.

    model: the config as a plain dict; spec: the config as our spec. classes: labels, to turn another model into a
    classifier (`made_one`); tensors of the classifier that the folder does not have are left out of `names`.
    """

    def __init__(self, path: str | Path, classes: tuple[str, ...] = ()) -> None:
        self.folder = Path(path)
        if not (self.folder / "config.json").is_file():
            rule = "must contain config.json and safetensors (or pytorch_model.bin) files"
            raise CheckpointError(f"{self.folder}: {other_formats.weights(path) or rule}")
        check_links(self.folder, CheckpointError)
        with reading(self.folder, CheckpointError):
            self.model: dict[str, Any] = model_dict(str(self.folder))
            self.spec = read_spec(self.model)
            values = read_json_object(self.folder / "config.json", CheckpointError)
            self.prefixed = values.get(PREFIX_LM) is True
            self.made_one = bool(classes) and self.spec.classifier is None
            if self.made_one:
                self.model = model_dict(Classified(str(self.folder), classes))
                self.spec = read_spec(self.model)
            self.shapes = full_shapes(self.spec)
            self._files = _Files(self.folder)
            self._prefix = self._missing_prefix()
            if self.made_one:
                self._leave_out_new()
            self._check()

    @property
    def names(self) -> list[str]:
        """Full names of our parameters."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return self.shapes[name]

    @property
    def state(self) -> dict[str, Any]:
        """The part of a checkpoint's state that these files contain: the biases of routers, and for a model whose
        prompts have bidirectional attention the data section of its run."""
        data: dict[str, Any] = {"data": _PROMPTS} if self.prefixed else {}
        with reading(self.folder, CheckpointError):
            return data | state_of(self.spec, self._read_bias)

    def _read_bias(self, file_name: str) -> Tensor:
        file_name = file_name.removeprefix(self._prefix)
        values = self._files.read(file_name, ())
        self._check_finite(file_name, values)
        return values

    def read(
        self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """A parameter, or its box at `offsets` of `shape`, in the file's dtype."""
        full = self.shapes[name]
        offsets = tuple(offsets) if offsets is not None else (0,) * len(full)
        shape = tuple(shape) if shape is not None else full
        entry = hf_tensor(self.spec, name)
        if entry.stacked:
            return self._read_stacked(entry, offsets, shape)
        groups = groups_of(entry, self.spec)
        pieces = []
        for start, stop in _file_rows(full[0], groups, entry, offsets[0], offsets[0] + shape[0]):
            ranges = [slice(start, stop)] + [
                slice(o, o + n) for o, n in zip(offsets[1:], shape[1:], strict=True)
            ]
            ranges = ranges[::-1] if entry.transposed else ranges
            piece = self._files.read(self._file_name(entry), tuple(ranges))
            self._check_finite(self._file_name(entry), piece)
            pieces.append(piece.t() if entry.transposed else piece)
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read_stacked(
        self, entry: HFTensor, offsets: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """A box of a parameter for which the files have a tensor for each expert."""
        ranges = tuple(slice(o, o + n) for o, n in zip(offsets[1:], shape[1:], strict=True))
        pieces = []
        for number in range(offsets[0], offsets[0] + shape[0]):
            file_name = entry.of_expert(number).removeprefix(self._prefix)
            pieces.append(self._files.read(file_name, ranges))
            self._check_finite(file_name, pieces[-1])
        return torch.stack(pieces)

    def _check_finite(self, file_name: str, part: Tensor) -> None:
        """Raises CheckpointError if a number of a tensor is not finite in fp32, the dtype of our master weights."""
        # aminmax returns NaN if any number is NaN, and then neither comparison is true.
        low, high = (end.item() for end in part.aminmax())
        if not (low >= -_LARGEST and high <= _LARGEST):
            rule = "every weight must be finite in fp32"
            raise CheckpointError(
                f"{self._files.where[file_name]}: {file_name}: has values from {low:g} to {high:g}: {rule}"
            )

    def _file_name(self, entry: HFTensor) -> str:
        return entry.name.removeprefix(self._prefix)

    def _missing_prefix(self) -> str:
        """The prefix that the files' names lack: files saved from a model without its head, such as GPT-2's, leave out
        "transformer."."""
        first = hf_tensor(self.spec, TIED_NAME).name
        prefix, where = first.partition(".")[0] + ".", self._files.where
        is_missing = first not in where and first.removeprefix(prefix) in where
        return prefix if is_missing else ""

    def _check(self) -> None:
        """Checks that the files contain every tensor of the model with its shape, and no other tensors."""
        known = set()
        for name, full in self.shapes.items():
            entry = hf_tensor(self.spec, name)
            shape = [*full[1:]] if entry.stacked else [full[0] * entry.parts, *full[1:]]
            for file_name in file_names(entry, self.spec):
                file_name = file_name.removeprefix(self._prefix)
                known.add(file_name)
                self._check_tensor(file_name, shape[::-1] if entry.transposed else shape)
        for file_name in bias_names(self.spec):
            file_name = file_name.removeprefix(self._prefix)
            known.add(file_name)
            self._check_tensor(file_name, [1, self.spec.experts])
        family = FAMILIES[self.spec.family]
        for file_name in family.copies:
            known |= self._copy(file_name)
        if self.spec.tied:
            known |= self._copy(self._file_name(self._head))
        if self.made_one:  # the language model's head, which is not used
            for name, entry in family.tensors.items():
                if name.startswith("head."):
                    known.add(self._file_name(entry))
        unused = family.unused
        for file_name in sorted(self._files.where.keys() - known):
            if not _BUFFERS.search(file_name) and not (unused and unused.search(file_name)):
                raise CheckpointError(
                    f"{self.folder}: {file_name}: unexpected tensor: a {self.spec.family} model with this "
                    "config does not have it"
                )

    def _check_tensor(self, file_name: str, wanted: list[int]) -> None:
        if file_name not in self._files.where:
            raise CheckpointError(
                f"{self.folder}: {file_name}: missing tensor: must be in a file of the folder"
            )
        found, dtype = self._files.shape(file_name)
        if found != wanted:
            raise CheckpointError(
                f"{self.folder}: {file_name}: shape {found}: must be {wanted} according to config.json"
            )
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.folder}: {file_name}: {dtype}: must be one of {', '.join(_FLOATS)}"
            )

    def _leave_out_new(self) -> None:
        """Leaves out the tensors of a new classifier's head that the files do not have."""
        for name in [name for name in self.shapes if name.startswith(_OF_HEADS)]:
            if self._file_name(hf_tensor(self.spec, name)) not in self._files.where:
                del self.shapes[name]

    @property
    def _head(self) -> HFTensor:
        return FAMILIES[self.spec.family].tensors[HEAD]

    def _copy(self, name: str) -> set[str]:
        """Checks that a copy of the embedding in the files, such as a tied head, equals it. Returns the name as a set,
        empty if there is no copy."""
        if name not in self._files.where:
            return set()
        if not torch.equal(self._files.read(name, ()), self.read(TIED_NAME)):
            rule = "tie_word_embeddings: True: must be false in config.json"
            if name != self._file_name(self._head):
                rule = f"a {self.spec.family} model has one embedding"
            raise CheckpointError(f"{self.folder}: {name}: differs from the embedding: {rule}")
        return {name}


def _file_rows(
    rows: int, groups: int, entry: HFTensor, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Half-open ranges of the file's rows that contain our rows [start, stop)."""
    height = rows // groups
    for group in range(start // height, -(-stop // height)):
        first, last = max(start, group * height), min(stop, (group + 1) * height)
        shift = (group * entry.parts + entry.part) * height - group * height
        yield first + shift, last + shift


def _is_plain(name: Any, value: Any) -> bool:
    """Whether an entry of a torch file is a named dense tensor with all its numbers in the file."""
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    if not isinstance(name, str) or not is_tensor:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


class _Files:
    """The tensors of a folder by name, in safetensors files or else in torch files (loaded with weights_only)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, Path] = {}
        self._written: dict[str, str] = {}  # the names in the file, which may be old ones
        self._open: dict[Path, Any] = {}
        paths = self._paths()
        if not paths:
            raise CheckpointError(
                f"{folder}: must contain config.json and safetensors (or pytorch_model.bin) files"
            )
        for path in paths:
            for name in self._handle(path).keys():  # noqa: SIM118
                known = name
                for old, new in _OLD_NAMES:
                    known = known.replace(old, new)
                self.where[known], self._written[known] = path, name

    def _paths(self) -> list[Path]:
        for index, single in (
            ("model.safetensors.index.json", "model.safetensors"),
            ("pytorch_model.bin.index.json", "pytorch_model.bin"),
        ):
            path = self.folder / index
            if path.exists():
                where = read_json_object(path, CheckpointError).get("weight_map")
                named = list(where.values()) if isinstance(where, dict) else []
                if not named or not all(isinstance(name, str) for name in named):
                    raise CheckpointError(f"{path}: weight_map: must name the file of each tensor")
                names = set(named)
                if any(Path(name).name != name for name in names):
                    raise CheckpointError(f"{path}: names a file outside its folder")
                return sorted(self.folder / name for name in names)
            if (self.folder / single).exists():
                return [self.folder / single]
        return sorted(self.folder.glob("*.safetensors"))

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open.clear()  # map one file at a time: mapped pages count as this process's memory
            try:
                if path.suffix == ".bin":
                    self._open[path] = torch.load(
                        path, map_location="cpu", weights_only=True, mmap=True
                    )
                else:
                    self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{path}: cannot be read: {' '.join(str(error).split())[:200]}"
                ) from error
            except (
                Exception
            ) as error:  # errors of pickle, and torch's rejection of anything but tensors
                raise CheckpointError(
                    f"{path}: must contain only tensors: {type(error).__name__}"
                ) from error
            held = self._open[path]
            odd = []
            if isinstance(held, dict):
                items = held.items()
                odd = [name for name, value in items if not _is_plain(name, value)]
            elif path.suffix == ".bin":
                odd = [type(held).__name__]
            if odd:
                del self._open[path]
                raise CheckpointError(f"{path}: must contain only tensors: {odd[0]!r}")
        return self._open[path]

    def shape(self, name: str) -> tuple[list[int], str]:
        """Shape, and dtype by its name in safetensors."""
        handle, name = self._handle(self.where[name]), self._written[name]
        if isinstance(handle, dict):
            tensor = handle[name]
            names = {
                torch.float64: "F64",
                torch.float32: "F32",
                torch.float16: "F16",
                torch.bfloat16: "BF16",
            }
            return list(tensor.shape), names.get(tensor.dtype, str(tensor.dtype))
        part = handle.get_slice(name)
        return list(part.get_shape()), part.get_dtype()

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        """The box of a tensor with these ranges; the whole tensor if there are none."""
        path, name = self.where[name], self._written[name]
        try:
            handle = self._handle(path)
            if isinstance(handle, dict):
                return handle[name][ranges] if ranges else handle[name]
            return handle.get_slice(name)[ranges] if ranges else handle.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: {name}: cannot be read: {' '.join(str(error).split())[:200]}"
            ) from error
