"""Tokenizes pairs of a text and its translation; only the translation's tokens count in the loss.

    {"source": "File not found", "target": "Datei nicht gefunden"}

The source is inserted into a template, which is followed by the translation and the end-of-document token. The two
parts are tokenized separately, so that the prompt before a translation is the same in training and generation.
"""

from dataclasses import dataclass
from typing import Any

from megalite.data.documents import Bad, text_of
from megalite.data.tokenizer import Encoder, Tokenizer
from megalite.errors import ConfigError, DataError

Marked = tuple[list[int], list[int]]  # token ids, and for each 1 if the loss counts it, else 0
SOURCE = "{source}"
TEMPLATE = f"{SOURCE} =>"


@dataclass(frozen=True)
class PairEncoder:
    """Converts pairs to documents of marked tokens; can be pickled for another process."""

    encoder: Encoder
    eod_id: int
    template: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: str, template: str) -> "PairEncoder":
        """Raises DataError for a tokenizer without an end-of-document token, ConfigError for a template without
        `{source}`."""
        if tokenizer.eod_id is None:
            raise DataError(f"{folder}: has no end-of-sequence token, which ends a translation")
        if SOURCE not in template:
            raise ConfigError(f"--template: {template!r}: must contain {SOURCE}")
        return cls(tokenizer.encoder(), tokenizer.eod_id, template)

    def prompts(self, sources: list[str]) -> list[list[int]]:
        """The token ids before the translation of each source."""
        return self.encoder.encode_batch(
            [self.template.replace(SOURCE, source) for source in sources]
        )

    def encode(self, pairs: list[tuple[str, str]]) -> list[Marked]:
        """One document for each pair."""
        prompts = self.prompts([source for source, _ in pairs])
        targets = self.encoder.encode_batch([target for _, target in pairs])
        found = []
        for prompt, target in zip(prompts, targets, strict=True):
            counted = [*target, self.eod_id]
            found.append((prompt + counted, [0] * len(prompt) + [1] * len(counted)))
        return found


def pair_of(found: dict[str, Any] | Bad, number: int) -> tuple[str, str] | Bad:
    """Source and target of a line's object. number: of the line."""
    source = text_of(found, "source", number)
    target = source if isinstance(source, Bad) else text_of(found, "target", number)
    if isinstance(source, str) and isinstance(target, str):
        if source.strip() and target.strip():
            return source, target
        return Bad(number, '"source" or "target" is empty')
    return source if isinstance(source, Bad) else target  # type: ignore[return-value]
