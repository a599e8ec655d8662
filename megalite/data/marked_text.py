"""Shows a document with the tokens that are trained on highlighted: in colour, or in [[ ]] without colour."""

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from megalite.config.masks import Masked
from megalite.data.masking import UNCOUNTED, Masking
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError

Run = tuple[str, bool]
"""A piece of text, and whether it is trained on."""
OPEN, CLOSE, CUT = "[[", "]]", "…"
_INDENT = 4
_STYLE = "black on green"
_UNFINISHED = "\ufffd"  # a decoder's replacement for an incomplete character


def runs_of(ids: Sequence[int], marks: np.ndarray, tokenizer: Tokenizer | None) -> Iterator[Run]:
    """A document cut where `marks` ([tokens], 1: trained on) change; as token ids if there is no tokenizer."""
    edges = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    written = ""
    for start, stop in pairwise(edges):
        marked = bool(marks[start])
        if tokenizer is None:
            if start:
                yield " ", False
            yield " ".join(map(str, ids[start:stop])), marked
            continue
        # Some decoders drop a leading space, so each piece is decoded together with everything before it.
        text = tokenizer.decode(ids[:stop], skip_special_tokens=False)
        if stop < len(ids):
            text = text.rstrip(_UNFINISHED)  # a character belongs to the piece with its last byte
        yield text[len(written) :], marked
        written = text


def drawn(ids: np.ndarray, number: int, share: float, tokenizer: Tokenizer | None) -> np.ndarray:
    """Marks ([tokens], uint8) of the tokens that masked language modelling predicts, in one draw of `share`.
    number: of the document, for the draw. Raises ConfigError if there is no mask token."""
    if tokenizer is None or tokenizer.mask_id is None:
        raise ConfigError(f"--masked: {share:g}: needs --tokenizer with a mask token")
    objective = Masked.model_validate({"masked": share})
    special, size = sorted(tokenizer.special_ids), tokenizer.vocabulary_size
    masking = Masking(objective, tokenizer.mask_id, special, size, seed=0)
    tokens = ids[None].astype(np.int64)
    labels = tokens.copy()
    masking.apply(tokens, labels, np.array([number]))
    return (labels[0] != UNCOUNTED).astype(np.uint8)


def shown(runs: Iterator[Run], characters: int, columns: int, colour: bool) -> list[str]:
    """The lines of a document, at most `characters` of it, each at most `columns` wide."""
    text, left = Text(), characters
    for piece, marked in runs:
        part, left = piece[:left], left - len(piece)
        style = _STYLE if marked and colour else ""
        opened, closed = (OPEN, CLOSE) if marked and not colour else ("", "")
        text.append(f"{opened}{_visible(part)}{closed}", style)
        if left < 0:
            text.append(CUT)
            break
    system = "standard" if colour else None
    console = Console(
        file=io.StringIO(),
        width=max(columns - _INDENT, 1),
        force_terminal=colour,
        color_system=system,
    )
    with console.capture() as capture:
        console.print(text, highlight=False, markup=False)
    return [f"{' ' * _INDENT}{line}".rstrip() for line in capture.get().rstrip("\n").split("\n")]


def _visible(text: str) -> str:
    """The text with control characters escaped, since they would affect a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
