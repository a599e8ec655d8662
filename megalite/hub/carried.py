"""The small files of a Hugging Face folder that accompany the weights: generation settings and tokenizer.

In our checkpoints they are in `hugging_face/` and listed in SHA256SUMS; training does not read them.
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
    """The tokenizer's files in a folder."""
    return (folder / name for name in _TOKENIZER if (folder / name).is_file())


def carried_files(folder: Path) -> Iterator[Path]:
    """All of the small files in a folder. Raises CheckpointError if a symbolic link in it points outside."""
    check_links(folder, CheckpointError)
    return (folder / name for name in _CARRIED if (folder / name).is_file())


def carry(source: Path, target: Path) -> None:
    """Copies the small files that `source` has and the folder `target` does not have. Raises CheckpointError if a
    symbolic link points outside `source`."""
    for path in carried_files(source):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def carried_by_run(tokenizer: str | None, weights: Weights | None) -> dict[str, bytes]:
    """The small files in a run's checkpoints, by name: its config's tokenizer, or else that of the weights that it
    starts from, and the generation settings of those weights. They are read once, since the folders may be removed
    before the run ends."""
    files: dict[str, Path] = {}
    if weights is not None:
        for folder in (weights.folder / CARRIED, weights.folder):
            files |= {path.name: path for path in carried_files(folder)}
    if tokenizer is not None:
        files = {name: path for name, path in files.items() if name == GENERATION}
        folder = Path(tokenizer)
        if folder.is_file():
            files[SENTENCEPIECE_FILE] = folder
        else:
            files |= {path.name: path for path in tokenizer_files(folder)}
    try:
        return {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def tokenizer_of(weights: Weights) -> Path | None:
    """The folder of the tokenizer that belongs to weights: their own, that of the small files, or the run's; None if
    there is none."""
    for folder in (weights.folder, weights.folder / CARRIED):
        if next(tokenizer_files(folder), None) is not None:
            return folder
    named = weights.state.get("tokenizer") if isinstance(weights, Checkpoint) else None
    return Path(named) if named else None


def stop_ids_of(weights: Weights) -> set[int]:
    """The tokens that end a text, from generation_config.json or else from the model's config."""
    values: Any = weights.model.get("eos_token_id")
    for folder in (weights.folder, weights.folder / CARRIED):
        if (folder / GENERATION).is_file():
            settings = read_json_object(folder / GENERATION, CheckpointError)
            values = settings.get("eos_token_id", values)
            break
    values = values if isinstance(values, list) else [values]
    return {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
