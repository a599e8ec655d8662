"""Opens weights by path, which may be a run folder, a checkpoint or a Hugging Face folder."""

from pathlib import Path
from typing import Any

from megalite import other_formats
from megalite.checkpoint.files import Checkpoint, find_checkpoint
from megalite.checkpoint.folder import SUMS
from megalite.checkpoint.weights import open_together, together
from megalite.errors import CheckpointError
from megalite.hub.hf_folder import HFFolder
from megalite.model.families import read_spec

Weights = Checkpoint | HFFolder
"""Both have model (a Hugging Face config as a dict), names, shape(name), read(name, offsets, shape), and state; the
state of a Hugging Face folder has only the biases of routers, and the data section if prompts are bidirectional."""


def is_hf_folder(path: str | Path) -> bool:
    """Whether a path is the folder of a Hugging Face model: it has a config.json that none of our runs wrote."""
    path = Path(path)
    return (
        (path / "config.json").is_file()
        and not (path / "checkpoints").exists()
        and not (path / SUMS).exists()
    )


def resolve_weights(path: str | Path) -> Path:
    """The folder that a user's path refers to; the files of our checkpoints are checked. Raises CheckpointError."""
    if not Path(path).exists():
        rule = "does not exist: must be a run folder, a checkpoint or a Hugging Face folder"
        raise CheckpointError(f"{path}: {other_formats.hub_name(path) or rule}")
    return Path(path) if is_hf_folder(path) else find_checkpoint(path)


def open_weights(folder: Path, classes: tuple[str, ...] = ()) -> Weights:
    """Opens a folder from `resolve_weights`, without checking tensors' files again. classes: as in HFFolder."""
    return HFFolder(folder, classes) if is_hf_folder(folder) else Checkpoint.open(folder)


def open_weights_together(folder: Path, classes: tuple[str, ...] = ()) -> Weights:
    """Opens a folder on every rank; a checkpoint's files are checked, divided among the ranks (collective). An error on
    one rank is raised on every rank."""
    if is_hf_folder(folder):
        return together(lambda: HFFolder(folder, classes))
    return open_together(folder)


def prompts_both_ways(state: dict[str, Any]) -> bool:
    """Whether weights were trained with prompts that have bidirectional attention, according to their state."""
    data = state.get("data")
    return isinstance(data, dict) and data.get("objective") == "prefix"


def is_of_classifier(weights: Weights) -> bool:
    """Whether weights are those of a classifier, including its head."""
    if isinstance(weights, HFFolder):
        return not weights.made_one
    return read_spec(weights.model).classifier is not None
