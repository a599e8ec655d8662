"""Classification with a language model: chooses, of the labels that occur in a file, the likeliest after each prompt.

A line has a form of fine-tuning data (data/chat_encoder.py), with the label as its completion, or as a conversation's
last answer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.data.chat_encoder import ChatEncoder, Marked
from megalite.data.chat_forms import NotChat
from megalite.errors import DataError
from megalite.inference.likelihood import Likelihood
from megalite.inputs import lines_of, parse_json

LARGEST = 1000  # most labels; each line is scored with every one


@dataclass(frozen=True)
class Labelled:
    """Lines to classify. names: the labels, in order. truth: the number of each line's label. rows: each line with each
    label, labels innermost; the label's tokens are marked."""

    names: list[str]
    truth: list[int]
    rows: list[Marked]


def read_labelled(path: str | Path, encoder: ChatEncoder, most_tokens: int) -> Labelled:
    """The lines of a file, cut on the left to `most_tokens`. Raises DataError, which names the file and the line."""
    lines = [(number, *_halves(path, number, text)) for number, text in lines_of(path, DataError)]
    completions = {_name(completion): completion for _, _, completion in lines}
    names = sorted(completions)
    if not 2 <= len(names) <= LARGEST:
        raise DataError(
            f"{path}: holds {len(names)} different completions: must be 2 to {LARGEST} labels"
        )
    rows = []
    for number, prompt, _ in lines:
        for name in names:
            try:
                ids, marks = encoder.encode({"prompt": prompt, "completion": completions[name]})[-1]
            except NotChat as error:
                raise DataError(f"{path}:{number}: {error}") from None
            if not any(marks[-most_tokens:][1:]):
                raise DataError(
                    f"{path}:{number}: no token of the label {name!r} has a token before it"
                )
            rows.append((ids[-most_tokens:], marks[-most_tokens:]))
    truth = [names.index(_name(completion)) for _, _, completion in lines]
    return Labelled(names, truth, rows)


def accuracy(labelled: Labelled, found: Sequence[Likelihood]) -> dict[str, Any]:
    """The figures for a file: the share of lines whose likeliest label is the right one, overall and by label;
    `commonest`: the share that always answering the most common label would reach."""
    size, truth = len(labelled.names), labelled.truth
    chosen = []
    for first in range(0, len(found), size):
        scores = [likelihood.log_probability for likelihood in found[first : first + size]]
        chosen.append(scores.index(max(scores)))
    lines, right = Counter(truth), Counter(t for t, c in zip(truth, chosen, strict=True) if t == c)
    return {
        "accuracy": right.total() / len(truth),
        "commonest": max(lines.values()) / len(truth),
        "lines": len(truth),
        "by_label": {
            name: right[number] / lines[number] for number, name in enumerate(labelled.names)
        },
    }


def _halves(path: str | Path, number: int, text: str) -> tuple[Any, Any]:
    line = parse_json(text, f"{path}:{number}", DataError)
    messages = line.get("messages") if isinstance(line, dict) else None
    if isinstance(messages, list) and len(messages) > 1:
        return messages[:-1], messages[-1:]
    if not isinstance(line, dict) or "prompt" not in line or "completion" not in line:
        raise DataError(f'{path}:{number}: must hold "prompt" and "completion", or "messages"')
    return line["prompt"], line["completion"]


def _name(completion: Any) -> str:
    """A label as text: the stripped completion, or a message's content."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1].get("content")
    return str(completion).strip()
