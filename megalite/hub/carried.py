"""The small files that travel with the weights, as a Hugging Face folder has them: generation settings and tokenizer.

In a checkpoint of ours they lie in `hugging_face/`, listed in its SHA256SUMS; nothing of training reads them.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalite.checkpoint.files import Checkpoint
from megalite.checkpoint.folder import CARRIED
from megalite.data.tokenizer import SENTENCEPIECE_FILE
from megalite.errors import CheckpointError
from megalite.hub.sources import Weights
from megalite.inputs import check_links, read_json_object

GENERATION = "generation_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    SENTENCEPIECE_FILE,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CARRIED = (*_TOKENIZER, GENERATION)


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The tokenizer's files that a folder holds."""
    return (folder / name for name in _TOKENIZER if (folder / name).is_file())


def carried_files(folder: Path) -> Iterator[Path]:
    """All of these that a folder holds. CheckpointError where a link in it leads out."""
    check_links(folder, CheckpointError)
    return (folder / name for name in _CARRIED if (folder / name).is_file())


def carry(source: Path, target: Path) -> None:
    """Copies those small files that `source` has and the folder `target` has not. CheckpointError where a link leads
    out of `source`."""
    for path in carried_files(source):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def carried_by_run(tokenizer: str | None, weights: Weights | None) -> dict[str, bytes]:
    """The files, by name, that a run's checkpoints carry: its config's tokenizer, or else the one that goes with the
    weights that it starts from, and generation settings of those. Read once: the folders may go before the run ends."""
    files: dict[str, Path] = {}
    if weights is not None:
        for place in (weights.folder / CARRIED, weights.folder):
            files |= {path.name: path for path in carried_files(place)}
    if tokenizer is not None:
        files = {name: path for name, path in files.items() if name == GENERATION}
        place = Path(tokenizer)
        if place.is_file():
            files[SENTENCEPIECE_FILE] = place
        else:
            files |= {path.name: path for path in tokenizer_files(place)}
    try:
        return {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def tokenizer_of(weights: Weights) -> Path | None:
    """The tokenizer that goes with weights: in their own folder, carried with them, or the run's."""
    for place in (weights.folder, weights.folder / CARRIED):
        if next(tokenizer_files(place), None) is not None:
            return place
    named = weights.state.get("tokenizer") if isinstance(weights, Checkpoint) else None
    return Path(named) if named else None


def stop_ids_of(weights: Weights) -> set[int]:
    """The tokens that end a text by generation_config.json, or else by the model's config."""
    values: Any = weights.model.get("eos_token_id")
    for place in (weights.folder, weights.folder / CARRIED):
        if (place / GENERATION).is_file():
            settings = read_json_object(place / GENERATION, CheckpointError)
            values = settings.get("eos_token_id", values)
            break
    values = values if isinstance(values, list) else [values]
    return {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
