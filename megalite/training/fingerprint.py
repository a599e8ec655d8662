"""Fingerprint of everything on which the samples of a run depend, besides seed and position. It is written into
state.json and compared when the run resumes: with another value it would silently be a different run.

Steps, batch sizes, layout, ZeRO stage and paths are not part of it: they may change.
"""

import json
from typing import Any

from megalite.config import Config, Data
from megalite.config.masks import Masked
from megalite.data.identity import identity
from megalite.data.indexed import labels_prefix, marks_prefix
from megalite.data.loader import tokenizer_ids
from megalite.data.tokenizer import load_tokenizer
from megalite.data.words import words_hash
from megalite.model.families import read_spec

TRAIN = "megalite.data.train"
TOKENIZER = "megalite.data.tokenizer"
IDS = "tokenizer ids"  # not a key: what the tokenizer of TOKENIZER determines
MADE_FOR = "megalite.data.megatron_samples"
_DIGITS = 12  # of shares: weights need not add up to 1


def fingerprint(config: Config) -> dict[str, Any]:
    """The fingerprint of a resolved config: JSON values by config key, and under IDS the tokenizer's ids on which
    samples depend. Reads the corpora's indices, and the tokenizer if such ids are used."""
    data = config.data
    whole = sum(source.weight for source in data.train)
    corpora = []
    for source in data.train:
        corpus: dict[str, Any] = {
            "share": round(source.weight / whole, _DIGITS), "split": source.split or [0.0, 1.0],
            "corpus": identity(source.path),
        }  # fmt: skip
        if data.loss == "marked":
            corpus["marks"] = identity(marks_prefix(source.path))
        if data.classes:
            corpus["labels"] = identity(labels_prefix(source.path))
        corpora.append(corpus)
    keys = ("sequence_length", "samples", "order", "reset_attention", "eod_mask_loss")
    values = {f"megalite.data.{key}": getattr(data, key) for key in keys}
    values["megalite.data.loss"] = data.loss or "all"
    values["megalite.data.objective"] = _objective(data)
    if isinstance(data.objective, Masked) and data.objective.whole_word:
        assert data.tokenizer is not None, "config/rules.py requires it"
        values[TOKENIZER] = {"words_sha256": words_hash(load_tokenizer(data.tokenizer))}
    if ids := tokenizer_ids(data, read_spec(config.model).vocabulary_size):
        values[IDS] = ids
    if data.megatron_samples is not None:
        values[MADE_FOR] = data.megatron_samples
    return {**values, TRAIN: corpora}


def _objective(data: Data) -> Any:
    """The objective as JSON. `whole_word` is omitted if it is off, since older checkpoints do not have it."""
    objective = data.objective
    if isinstance(objective, Masked):
        off = set() if objective.whole_word else {"whole_word"}
        return objective.model_dump(exclude=off)
    return objective if isinstance(objective, str) else objective.model_dump()


def difference(was: dict[str, Any], config: Config) -> tuple[str, str] | None:
    """The first difference between a checkpoint's fingerprint and a resolved config: the key with the config's value,
    and the checkpoint's value. None if they are equal."""
    now = fingerprint(config)
    for key in sorted(now.keys() & was.keys() - {TRAIN, IDS}):
        if now[key] != was[key]:
            return f"{key}: {json.dumps(now[key])}", json.dumps(was[key])
    if (found := _other_ids(was.get(IDS, {}), now.get(IDS, {}), config.data)) is not None:
        return found
    ours, theirs = now[TRAIN], was[TRAIN]
    if len(ours) != len(theirs):
        return f"{TRAIN}: {len(ours)} corpora", str(len(theirs))
    for number, (source, ours_here, theirs_here) in enumerate(
        zip(config.data.train, ours, theirs, strict=True)
    ):
        key = f"{TRAIN}.{number}"
        paths = {
            "corpus": source.path,
            "marks": marks_prefix(source.path),
            "labels": labels_prefix(source.path),
        }
        for kind, path in paths.items():
            if ours_here.get(kind) != theirs_here.get(kind):
                holds = f"{key}.path: {path}: holds {_described(ours_here[kind])}"
                return holds, f"the corpus of {_described(theirs_here[kind])}"
        if ours_here["split"] != theirs_here["split"]:
            return f"{key}.split: {ours_here['split']}", str(theirs_here["split"])
        if ours_here["share"] != theirs_here["share"]:
            return f"{key}.weight: {ours_here['share']} of all", f"{theirs_here['share']} of all"
    return None


def _other_ids(was: dict[str, Any], now: dict[str, Any], data: Data) -> tuple[str, str] | None:
    """As `difference`, for the tokenizer's ids, which older checkpoints do not have."""
    for name in sorted(was.keys() & now.keys()):
        if now[name] != was[name]:
            path = data.tokenizer or "left out"
            return f"{TOKENIZER}: {path}: {name} {now[name]}", json.dumps(was[name])
    return None


def _described(corpus: dict[str, Any]) -> str:
    sums = f"index {corpus['index_sha256'][:8]}…, tokens {corpus['tokens_sha256'][:8]}…"
    return f"{corpus['tokens']:,} tokens in {corpus['documents']:,} documents ({sums})"
