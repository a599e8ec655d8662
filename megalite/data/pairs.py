"""Lines of a text and its translation to tokens, of which the loss counts the translation's.

    {"source": "File not found", "target": "Datei nicht gefunden"}

The source is put into a template, and the translation follows it with the end-of-document token. Both are tokenized by
themselves, so that what a model sees before a translation is the same in training and when it translates.
"""

from dataclasses import dataclass
from typing import Any

from megalite.data.documents import Bad, text_of
from megalite.data.tokenizer import Encoder, Tokenizer
from megalite.errors import ConfigError, DataError

Marked = tuple[list[int], list[int]]  # token ids, and of each 1 where the loss counts it
SOURCE = "{source}"
TEMPLATE = f"{SOURCE} =>"


@dataclass(frozen=True)
class PairEncoder:
    """Pairs to documents of marked tokens; it can be sent to another process."""

    encoder: Encoder
    eod_id: int
    template: str

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: str, template: str) -> "PairEncoder":
        """Raises DataError for a tokenizer without an end of document, ConfigError for a template without a source."""
        if tokenizer.eod_id is None:
            raise DataError(f"{folder}: has no end-of-sequence token, which ends a translation")
        if SOURCE not in template:
            raise ConfigError(f"--template: {template!r}: must hold {SOURCE}")
        return cls(tokenizer.encoder(), tokenizer.eod_id, template)

    def prompts(self, sources: list[str]) -> list[list[int]]:
        """The text before the translation of each source."""
        return self.encoder.encode_batch(
            [self.template.replace(SOURCE, source) for source in sources]
        )

    def encode(self, pairs: list[tuple[str, str]]) -> list[Marked]:
        """A document of each pair."""
        prompts = self.prompts([source for source, _ in pairs])
        targets = self.encoder.encode_batch([target for _, target in pairs])
        found = []
        for prompt, target in zip(prompts, targets, strict=True):
            counted = [*target, self.eod_id]
            found.append((prompt + counted, [0] * len(prompt) + [1] * len(counted)))
        return found


def pair_of(found: dict[str, Any] | Bad, number: int) -> tuple[str, str] | Bad:
    """Source and target of a line's object; number: of the line."""
    source = text_of(found, "source", number)
    target = source if isinstance(source, Bad) else text_of(found, "target", number)
    if isinstance(source, str) and isinstance(target, str):
        if source.strip() and target.strip():
            return source, target
        return Bad(number, '"source" or "target" is empty')
    return source if isinstance(source, Bad) else target  # type: ignore[return-value]
