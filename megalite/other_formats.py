"""Recognises files that were made for other programs, for the error line that says why a path cannot be used.

Each function looks at file names only, opens nothing, and returns "" if it recognises nothing. docs/coming_from.md has
more about each format.
"""

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEEPSPEED = (
    "mp_rank_*_model_states.pt",
    "layer_*-model_states.pt",
    "*zero_pp_rank_*_optim_states.pt",
)
_MEGATRON = ("iter_*/mp_rank_*", "iter_*/*.distcp", "latest_checkpointed_iteration.txt")
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt")
_MORE = "docs/coming_from.md"
_HALVES = "put vocab.json, merges.txt and a tokenizer_config.json into a folder"
_TEXTS = (".txt", ".md", ".jsonl", ".json", ".parquet", ".gz", ".zst", ".csv")


def hub_name(path: str | Path) -> str:
    """A hint for a name such as meta-llama/Llama-3.2-1B, if no such path exists."""
    name = str(path)
    if not _HUB_NAME.fullmatch(name) or Path(name).exists() or Path(name).parent.exists():
        return ""
    rule = "does not exist; if it is a name on the Hugging Face Hub, download it first and give the folder"
    return f"{rule}: hf download {name} --local-dir FOLDER"


def weights(path: str | Path) -> str:
    """A hint for weights: a checkpoint of another trainer, a single file, an adapter."""
    path = Path(path)
    if not path.exists():
        return hub_name(path)
    if path.is_file():
        return "is a file: give the folder that contains it and its config.json"
    for where in (path, *path.glob("global_step*")):
        if any(next(where.glob(pattern), None) for pattern in _DEEPSPEED):
            return f"is a checkpoint in DeepSpeed's format (Megatron-DeepSpeed, GPT-NeoX): {_convert()}"
    if any(
        next(path.glob(pattern), None) for pattern in (*_MEGATRON, "mp_rank_*/model_optim_rng.pt")
    ):
        return f"is a Megatron-LM checkpoint: {_convert()}"
    if (path / "checkpoint_metadata.json").exists() and (path / "model").is_dir():
        return f"is a nanotron checkpoint: {_convert()}"
    if (path / "adapter_config.json").exists():
        return "is a PEFT adapter: merge it into its model (merge_and_unload, save_pretrained)"
    inside = sorted(path.glob("checkpoint-*/config.json"), key=_number)
    if inside:
        return f"contains checkpoints of Hugging Face's Trainer: give one of them, such as {inside[-1].parent}"
    return ""


def _number(path: Path) -> int:
    digits = path.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _convert() -> str:
    return f"convert it to a Hugging Face folder first ({_MORE})"


def tokenizer(path: str | Path) -> str:
    """A hint for a tokenizer: a single file of one, or files without the settings that name their type."""
    path = Path(path)
    name = path.name.lower()
    if path.is_file():
        if name.endswith("tokenizer.json"):
            return (
                "is one file of a tokenizer (such as GPT-NeoX's 20B_tokenizer.json): put it into a folder as "
                f"tokenizer.json, with a tokenizer_config.json that names its eos_token ({_MORE})"
            )
        if name.endswith(("vocab.json", "merges.txt", "vocab.bpe")):
            return f"is one of the two files of GPT-2's tokenizer: {_HALVES} ({_MORE})"
        if name.endswith("vocab.txt"):
            return (
                "is the vocabulary of a BERT tokenizer: put it into a folder as vocab.txt, with a "
                f'tokenizer_config.json that contains {{"tokenizer_class": "BertTokenizer"}} ({_MORE})'
            )
        return ""
    if not path.exists():
        return hub_name(path)
    settings = [path / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    files = [file for file in _VOCABULARIES if (path / file).is_file()]
    if files and not any(file.is_file() for file in settings):
        kind = "BertTokenizer" if files == ["vocab.txt"] else "GPT2Tokenizer"
        return (
            f"contains {' and '.join(files)} but no tokenizer_config.json, which names the tokenizer's class: for "
            f'{kind}, write {{"tokenizer_class": "{kind}"}} to that file'
        )
    return ""


def corpus(prefix: str | Path) -> str:
    """A hint for a corpus: one of its two files, a text that is not tokenized yet, another spelling of the prefix."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.exists():
        return f"is one of a corpus's two files: give the prefix of both, {path.with_suffix('')}"
    if path.is_file() and path.suffix in _TEXTS:
        return f"is a text: tokenize it (megalite preprocess), or train on it directly: megalite pretrain {path}"
    if path.is_dir():
        inside = sorted(path.glob("*.idx"))
        named = f", such as {inside[0].with_suffix('')}" if inside else ""
        return f"is a folder: give the prefix of a corpus's .bin and .idx files{named}"
    for other in (f"{prefix}_text_document", f"{prefix}_text_sentence"):  # as Megatron names them
        if Path(f"{other}.idx").exists():
            return f"no such corpus; did you mean {other}?"
    return ""
