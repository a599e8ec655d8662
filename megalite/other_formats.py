"""What a path holds that was made for another program, in words: for the one line about why it cannot be used.

Each function looks at names alone, opens nothing, and returns "" where it recognises nothing. docs/coming_from.md has
more about each.
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
    """Of a name such as meta-llama/Llama-3.2-1B, where no such path exists."""
    name = str(path)
    if not _HUB_NAME.fullmatch(name) or Path(name).exists() or Path(name).parent.exists():
        return ""
    get = f"hf download {name} --local-dir FOLDER"
    return f"does not exist; if it is a name on the Hugging Face Hub, fetch it first and give the folder: {get}"


def weights(path: str | Path) -> str:
    """Of weights: a checkpoint of another trainer, a single file, an adapter."""
    path = Path(path)
    if not path.exists():
        return hub_name(path)
    if path.is_file():
        return "is a file: give the folder that holds it, with its config.json"
    for where in (path, *path.glob("global_step*")):
        if any(next(where.glob(pattern), None) for pattern in _DEEPSPEED):
            return f"is a checkpoint of DeepSpeed's own format (Megatron-DeepSpeed, GPT-NeoX): {_convert()}"
    if any(
        next(path.glob(pattern), None) for pattern in (*_MEGATRON, "mp_rank_*/model_optim_rng.pt")
    ):
        return f"is a checkpoint of Megatron-LM: {_convert()}"
    if (path / "checkpoint_metadata.json").exists() and (path / "model").is_dir():
        return f"is a checkpoint of nanotron: {_convert()}"
    if (path / "adapter_config.json").exists():
        return "is an adapter (peft): merge it into its model first (merge_and_unload, save_pretrained)"
    inside = sorted(path.glob("checkpoint-*/config.json"), key=_number)
    if inside:
        return f"holds checkpoints of Hugging Face's Trainer: give one of them, such as {inside[-1].parent}"
    return ""


def _number(path: Path) -> int:
    digits = path.parent.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _convert() -> str:
    return f"convert it to a Hugging Face folder first ({_MORE})"


def tokenizer(path: str | Path) -> str:
    """Of a tokenizer: a file of one alone, or files without the settings that say what they are."""
    path = Path(path)
    name = path.name.lower()
    if path.is_file():
        if name.endswith("tokenizer.json"):
            return (
                "is one file of a tokenizer (GPT-NeoX's 20B_tokenizer.json is such a file): put it into a folder as "
                f"tokenizer.json, with a tokenizer_config.json that names its eos_token ({_MORE})"
            )
        if name.endswith(("vocab.json", "merges.txt", "vocab.bpe")):
            return f"is half of GPT-2's tokenizer: {_HALVES} ({_MORE})"
        if name.endswith("vocab.txt"):
            return (
                "is a vocabulary of BERT's tokenizer: put it into a folder as vocab.txt, with a tokenizer_config.json "
                f'that says {{"tokenizer_class": "BertTokenizer"}} ({_MORE})'
            )
        return ""
    if not path.exists():
        return hub_name(path)
    settings = [path / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    files = [file for file in _VOCABULARIES if (path / file).is_file()]
    if files and not any(file.is_file() for file in settings):
        kind = "BertTokenizer" if files == ["vocab.txt"] else "GPT2Tokenizer"
        return (
            f"holds {' and '.join(files)} without a tokenizer_config.json, which says what they are: for {kind} write "
            f'{{"tokenizer_class": "{kind}"}} into it'
        )
    return ""


def corpus(prefix: str | Path) -> str:
    """Of a corpus: one of its two files, a text that is not tokenized yet, another spelling of the prefix."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx") and path.exists():
        return f"is one of a corpus's two files: give the prefix of both, {path.with_suffix('')}"
    if path.is_file() and path.suffix in _TEXTS:
        return f"is a text: tokenize it first (megalite preprocess), or train on it directly: megalite pretrain {path}"
    if path.is_dir():
        inside = sorted(path.glob("*.idx"))
        named = f", such as {inside[0].with_suffix('')}" if inside else ""
        return f"is a folder: give the prefix of a corpus's .bin and .idx files{named}"
    for other in (f"{prefix}_text_document", f"{prefix}_text_sentence"):  # as Megatron names them
        if Path(f"{other}.idx").exists():
            return f"no such corpus; did you mean {other}?"
    return ""
