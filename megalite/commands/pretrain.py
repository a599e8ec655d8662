"""Train a model.

megalite pretrain --deepspeed_config FILE [KEY=VALUE …]
    train as in a JSON config, on the ranks that a launcher starts, or in one process without a launcher

megalite pretrain my.txt [KEY=VALUE …]
    train directly from text: train a tokenizer, tokenize, set 5 % aside for validation, choose a small model, train it
    in one process and show samples. Prints the chosen config, to be edited and run again.
"""

import argparse
import json
import sys
from pathlib import Path

from megalite.commands.from_text import (
    CONFIG,
    TRAIN,
    VALID,
    VALID_SHARE,
    TextRun,
    find_inputs,
    prepare_text,
)
from megalite.config import load_config
from megalite.config.reading import apply_overrides, read_json
from megalite.data.indexed import IndexedCorpus
from megalite.data.tokenizer import load_tokenizer, prompt_ids
from megalite.errors import ConfigError, MegaliteError
from megalite.ranks.arguments import ArgumentParser, RawHelpFormatter, at_least, share
from megalite.ranks.rank_info import rank_info
from megalite.report.read import REPORT, value_at
from megalite.training import pretraining

_SAMPLES = 3
_PROMPT_TOKENS = 8
_SAMPLE_TOKENS = 80


def main(arguments: list[str]) -> int:
    """Trains from a config or from text; returns the exit code."""
    if any(word.partition("=")[0] == "--deepspeed_config" for word in arguments):
        return pretraining.main(arguments)
    try:
        options, texts, overrides = _asked(arguments)
    except ConfigError as error:
        error.agreed = True  # every rank has the same arguments
        raise
    return _from_text(options, texts, overrides)


def _asked(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """The options, texts and overrides of a run from text. Raises ConfigError if they are not valid."""
    options = _parse(arguments)
    texts = [word for word in options.words if _is_path(word)]
    overrides = [word for word in options.words if not _is_path(word)]
    if not texts:
        raise ConfigError("--deepspeed_config: missing: give a config, or a text file to train on")
    if rank_info().world_size > 1:
        rule = (
            "text is prepared by one process: run megalite pretrain TEXT --check, then its config "
            "on several ranks"
        )
        raise ConfigError(f"{texts[0]}: {rule}")
    return options, texts, overrides


def _is_path(word: str) -> bool:
    return "=" not in word or Path(word).exists()


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawHelpFormatter)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="TEXT|KEY=VALUE",
        help="text files or folders of text files; a dotted path into the JSON and its value",
    )
    parser.add_argument("--deepspeed_config", metavar="FILE", help="the run's JSON config")
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate config and data, print the resolved JSON and exit",
    )
    parser.add_argument(
        "--world-size", type=at_least(1), metavar="N", help="with --check: number of ranks"
    )
    text = parser.add_argument_group("from text")
    text.add_argument("--tokenizer", metavar="FOLDER", help="use this one instead of training one")
    text.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="of the tokenizer (default: by the size of the text)",
    )
    text.add_argument(
        "--valid-share",
        type=share,
        default=VALID_SHARE,
        metavar="X",
        help=f"share of the tokens for validation (default: {VALID_SHARE})",
    )
    text.add_argument("--run-dir", metavar="FOLDER", help="default: runs/NAME of the text")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tokenizer is not None and options.vocab_size is not None:
        rule = "cannot be used with --tokenizer, which has its own vocabulary"
        raise ConfigError(f"--vocab-size: {options.vocab_size}: {rule}")
    if options.world_size is not None and not options.check:
        raise ConfigError(f"--world-size: {options.world_size}: {pretraining.ONLY_WITH_CHECK}")
    return options


def _from_text(options: argparse.Namespace, texts: list[str], overrides: list[str]) -> int:
    name = Path(texts[0]).resolve().name.partition(".")[0] or "text"
    run_dir = Path(options.run_dir or f"runs/{name}")
    inputs = find_inputs(texts, run_dir)
    run = TextRun(name, inputs, run_dir, options.tokenizer, options.vocab_size, options.valid_share)
    _print(f"{len(inputs)} text file{'s' if len(inputs) > 1 else ''}: tokenizer and corpora …")
    folder, was_there = prepare_text(run)
    how = "reused from an earlier start" if was_there else "prepared"
    _print(f"{folder}: {how}: {_corpora(folder)}")
    path = folder / CONFIG
    overrides = _with_shorter_warmup(path, overrides)
    words = ["--deepspeed_config", str(path), *overrides]
    if options.check:
        ranks = [] if options.world_size is None else ["--world-size", str(options.world_size)]
        return pretraining.main([*words, "--check", *ranks])
    config = load_config(path, overrides)
    print(path.read_text(encoding="utf-8"), end="", flush=True)
    _print(f"to change it: edit {path} and run megalite pretrain --deepspeed_config {path}")
    code = pretraining.main(words)
    if code == 0:
        _show_samples(Path(config.train.run_dir), folder)
    return code


def _with_shorter_warmup(path: Path, overrides: list[str]) -> list[str]:
    """The overrides, and one more if they leave fewer steps than the chosen config's warm-up. Raises ConfigError if
    they do not fit a config."""
    document = apply_overrides(read_json(path), overrides)
    steps = value_at(document, "megalite", "train", "steps")
    warmup = value_at(document, "scheduler", "params", "warmup_steps")
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps:
        overrides = [*overrides, f"scheduler.params.warmup_steps={steps // 20}"]
    load_config(path, overrides)
    return overrides


def _corpora(folder: Path) -> str:
    """Tokens of both corpora and the tokenizer's pieces, as text."""
    counts = [IndexedCorpus(folder / name).num_tokens for name in (TRAIN, VALID)]
    pieces = load_tokenizer(folder / "tokenizer").vocabulary_size
    return f"{counts[0]:,} tokens to train on, {counts[1]:,} for validation, {pieces:,} pieces"


def _show_samples(run_dir: Path, folder: Path) -> None:
    """Prints continuations of prompts from the validation text, and saves them in the run folder."""
    from megalite.api import load
    from megalite.ranks.devices import use_exact_products

    use_exact_products()
    model = load(run_dir)
    tokens = IndexedCorpus(folder / VALID).tokens
    starts = [i * (len(tokens) - _PROMPT_TOKENS) // _SAMPLES for i in range(_SAMPLES)]
    prompts = [
        model.tokenizer.decode(tokens[start : start + _PROMPT_TOKENS].tolist()) for start in starts
    ]
    most = model.stage.spec.max_positions
    lines = []
    for prompt in filter(str.strip, prompts):
        used = len(prompt_ids(model.tokenizer, prompt))
        count = _SAMPLE_TOKENS if most is None else min(_SAMPLE_TOKENS, most - used)
        try:
            text = model.generate(prompt, max_new_tokens=count, temperature=0.8, top_k=50)
        except MegaliteError as error:  # training is done; this must not fail it
            _print(f"no sample: {error}")
            continue
        lines.append(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        _print(f"sample: {prompt}|{text}")
    (run_dir / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    if (run_dir / REPORT).exists():
        _print(f"curves and more: {run_dir / REPORT}")
    _print(f'more: megalite generate --checkpoint {run_dir} --prompt "…" --temperature 0.8')


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
