"""From text files to a config that one process can train: the first part of `megalite pretrain my.txt`.

    runs/data/NAME-HASH/       named after the text's content, so that a second start finds it and a changed text
        tokenizer/             does not; HASH is of the files, the tokenizer and the options below
        train.bin, valid.bin   with their indices: the text in tokens, about 5 % of them for validation
        config.json            the config, to be edited and run again

Nothing here is needed by a config that names its own corpora.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megalite.checkpoint.folder import write_durably
from megalite.config.rules import machine_has_gpu
from megalite.data.documents import kind_of, read_texts
from megalite.data.indexed import IndexedCorpus
from megalite.data.preprocessing import preprocess
from megalite.data.split_corpus import split_corpus
from megalite.data.tokenizer import EQUAL_FILE, load_tokenizer
from megalite.data.tokenizer_training import VocabularyTooLarge, train_tokenizer
from megalite.errors import DataError
from megalite.hub.carried import tokenizer_files
from megalite.hub.whole import appearing
from megalite.inputs import check_links, reading

VALID_SHARE = 0.05
TOKENIZER, TRAIN, VALID, CONFIG = "tokenizer", "train", "valid", "config.json"
_VERSION = 1  # of the files made here: another version makes everything again
_BLOCK = 1 << 20
_MADE = re.compile(r"-[0-9a-f]{12}$")  # end of the name of a folder that is made here
_BYTE_PIECES = 256 + 3  # a tokenizer's pieces for each byte, and <unk>, <s>, </s>
# (bytes of text, pieces of its tokenizer): about one piece per thousand bytes, in powers of two.
_VOCABULARIES = (
    (0, 512),
    (10**6, 1024),
    (3 * 10**6, 2048),
    (10**7, 4096),
    (5 * 10**7, 8192),
    (5 * 10**8, 32_000),
)
_EPOCHS = 4  # a model this small gains little from more
_LEAST_STEPS = 50


class Size(NamedTuple):
    """A model for texts of at least `tokens` tokens, with its training settings."""

    tokens: int
    hidden: int
    layers: int
    heads: int
    sequence: int
    micro_batch: int
    accumulation: int
    lr: float
    most_steps: int


ON_CPU = (
    Size(0, 64, 2, 2, 64, 8, 1, 4e-3, 300),
    Size(40_000, 128, 4, 4, 128, 16, 1, 4e-3, 500),
    Size(2_000_000, 192, 6, 6, 256, 8, 2, 3e-3, 600),
)
ON_GPU = (
    *ON_CPU[:2],
    Size(2_000_000, 384, 6, 6, 256, 32, 2, 1e-3, 5_000),
    Size(30_000_000, 512, 8, 8, 512, 32, 2, 1e-3, 20_000),
    Size(300_000_000, 768, 12, 12, 1024, 16, 8, 6e-4, 50_000),
)


@dataclass(frozen=True)
class TextRun:
    """What to train on and where. inputs: text files. tokenizer: a folder; None: train one. vocab_size: of the trained
    one; None: by the size of the text. valid_share: share of the tokens for validation."""

    name: str
    inputs: list[str]
    run_dir: Path
    tokenizer: str | None = None
    vocab_size: int | None = None
    valid_share: float = VALID_SHARE


def find_inputs(paths: list[str], run_dir: Path) -> list[str]:
    """The text files of some paths; of a folder all files with a text file's ending, without hidden ones and without
    what training in `run_dir` writes. Raises DataError."""
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [
                str(file)
                for file in sorted(path.rglob("*"))
                if _is_text(file) and not _is_hidden(file, path) and not _is_output(file, run_dir)
            ]
            if not inside:
                rule = "must contain .txt, .md, .jsonl or .parquet files (also with .gz or .zst)"
                raise DataError(f"{path}: {rule}")
            found += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file: must be a text file or a folder of text files")
        else:
            kind_of(str(path))
            found.append(str(path))
    return found


def _is_text(path: Path) -> bool:
    try:
        kind_of(path.name)
    except DataError:
        return False
    return path.is_file() and path.suffix != ".json"  # .json files are most likely settings


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_output(file: Path, run_dir: Path) -> bool:
    """Whether a start of this run or of its neighbours made the file: it would change the inputs of a second start."""
    path, run, data = file.resolve(), run_dir.resolve(), data_folder(run_dir).resolve()
    if path.is_relative_to(run):
        return True
    return path.is_relative_to(data) and bool(_MADE.search(path.relative_to(data).parts[0]))


def data_folder(run_dir: Path) -> Path:
    """The folder of the tokenizers and corpora of a run, with one subfolder per text."""
    return run_dir.parent / "data"


def prepare_text(run: TextRun) -> tuple[Path, bool]:
    """The folder with tokenizer, corpora and config, and whether it already existed. Raises DataError."""
    with reading(run.inputs[0], DataError):
        digest = _digest(run)
        folder = data_folder(run.run_dir) / f"{run.name}-{digest[:12]}"
        if (folder / CONFIG).exists():
            return folder, True
        shutil.rmtree(folder, ignore_errors=True)  # its config is missing, so it is incomplete
        with appearing(folder, DataError) as partial:
            partial.mkdir()
            _fill(run, partial)
            config = choose_config(run, partial, folder)
            write_durably(partial / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder, False


def _digest(run: TextRun) -> str:
    """A hash of everything on which the corpora depend."""
    options = (_VERSION, str(run.run_dir), run.vocab_size, run.valid_share, machine_has_gpu())
    whole = hashlib.sha256(repr(options).encode())
    files = [Path(name) for name in run.inputs]
    if run.tokenizer is not None:
        given = Path(run.tokenizer)
        found = [*tokenizer_files(given)] if given.is_dir() else [given]
        if not found:
            raise DataError(f"--tokenizer: {given}: contains no tokenizer")
        files += found
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        part = hashlib.sha256(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                part.update(block)
        whole.update(part.digest())
    return whole.hexdigest()


def _fill(run: TextRun, folder: Path) -> None:
    """Makes the tokenizer and both corpora."""
    tokenizer = folder / TOKENIZER
    if run.tokenizer is not None:
        load_tokenizer(run.tokenizer)  # so that an error names this path, not the copy
    if run.tokenizer is None:
        _train_tokenizer(run, tokenizer)
    elif Path(run.tokenizer).is_dir():
        tokenizer.mkdir()
        check_links(run.tokenizer, DataError)
        equal = Path(run.tokenizer, EQUAL_FILE)
        for path in (*tokenizer_files(Path(run.tokenizer)), *([equal] if equal.is_file() else [])):
            shutil.copyfile(path, tokenizer / path.name)
    else:
        tokenizer.mkdir()
        shutil.copy(run.tokenizer, tokenizer / "tokenizer.model")
    has_end = load_tokenizer(tokenizer).eod_id is not None
    whole = folder / "whole"
    preprocess(run.inputs, tokenizer, whole, append_eod=has_end)
    wanted = round(IndexedCorpus(whole).num_tokens * run.valid_share)
    split_corpus(whole, folder / TRAIN, folder / VALID, wanted)
    for file in folder.glob("whole.*"):
        file.unlink()


def _train_tokenizer(run: TextRun, folder: Path) -> None:
    """Trains a tokenizer of the given size, otherwise of a size for the text, or smaller if its lines are too
    repetitive."""
    size = run.vocab_size or vocabulary_for(run.inputs)
    try:
        train_tokenizer(run.inputs, size, "bpe", folder)
    except VocabularyTooLarge as error:
        if run.vocab_size is not None:
            raise
        train_tokenizer(run.inputs, error.most, "bpe", folder)


def vocabulary_for(inputs: list[str]) -> int:
    """Vocabulary size for these texts: by their size, with room for all their characters."""
    size, characters = 0, set[str]()
    for text in read_texts(inputs):
        size += len(text.encode())
        characters.update(text)
    least = _BYTE_PIECES + len(characters) + 64
    by_size = max(pieces for least_bytes, pieces in _VOCABULARIES if size >= least_bytes)
    return max(by_size, 1 << (least - 1).bit_length() if least > by_size else 0)


def size_for(tokens: int, gpu: bool) -> Size:
    """The model for a text of `tokens` tokens."""
    return next(size for size in reversed(ON_GPU if gpu else ON_CPU) if tokens >= size.tokens)


def choose_config(run: TextRun, partial: Path, folder: Path) -> dict[str, Any]:
    """The config for corpora in `partial`, which will be `folder`. Raises DataError if the text is too short."""
    tokens = {name: IndexedCorpus(partial / name).num_tokens for name in (TRAIN, VALID)}
    size = size_for(tokens[TRAIN], machine_has_gpu())
    for name, count in tokens.items():
        if count <= size.sequence:
            raise DataError(
                f"{run.inputs[0]}: has {count} tokens for {name}: must have more than a sample's {size.sequence}"
            )
    batch = size.micro_batch * size.accumulation
    steps = _EPOCHS * tokens[TRAIN] // (batch * size.sequence)
    steps = min(size.most_steps, max(_LEAST_STEPS, round(steps, -1)))
    model = {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 11 // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": load_tokenizer(partial / TOKENIZER).vocabulary_size,
        "max_position_embeddings": 4 * size.sequence,
        "tie_word_embeddings": True,
    }
    return {
        "train_micro_batch_size_per_gpu": size.micro_batch,
        "gradient_accumulation_steps": size.accumulation,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": size.lr, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "cosine",
            "params": {"warmup_steps": max(1, steps // 20), "min_ratio": 0.1},
        },
        "megalite": {
            "model": model,
            "data": {
                "tokenizer": str(folder / TOKENIZER),
                "sequence_length": size.sequence,
                "train": [str(folder / TRAIN)],
                "valid": [str(folder / VALID)],
            },
            "train": {
                "steps": steps,
                "run_dir": str(run.run_dir),
                "eval_interval": max(1, steps // 10),
                "eval_steps": min(8, max(1, tokens[VALID] // (batch * size.sequence))),
                "checkpoint_interval": max(1, steps // 2),
                "log_interval": 10,
            },
        },
    }
