"""Prompts to tokens, and streaming of texts, for every program that generates.

Next: generate.py, which generates the tokens.
"""

from collections.abc import Callable, Iterable, Sequence

from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec


def as_sources(
    spec: TransformerSpec, tokenizer: Tokenizer, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """The prompts as the model's inputs: for an encoder-decoder they are sources, which end with the end-of-document
    token. Raises ConfigError for a tokenizer without one."""
    if spec.stacks is None:
        return list(prompts)
    if tokenizer.eod_id is None:
        rule = f"has no end-of-sequence token, which ends a {spec.family} model's source"
        raise ConfigError(f"--tokenizer: {rule}")
    return [[*prompt, tokenizer.eod_id] for prompt in prompts]


def check_ids(spec: TransformerSpec, rows: Iterable[Sequence[int]]) -> None:
    """Raises ConfigError if a tokenizer produces ids that the model does not have."""
    highest = max((max(row, default=0) for row in rows), default=0)
    if highest >= spec.vocabulary_size:
        raise ConfigError(
            f"--tokenizer: produces id {highest}: must be below the model's vocab_size {spec.vocabulary_size}"
        )


class Growing:
    """Streams a text.

    text_of: returns the text of the tokens so far. show: takes each new piece, once its characters are complete.
    """

    def __init__(
        self, text_of: Callable[[Sequence[int]], str], show: Callable[[str], None]
    ) -> None:
        self.text_of, self.show = text_of, show
        self.tokens: list[int] = []
        self.written = ""

    def add(self, number: int, token: int) -> None:
        """Adds the next token; called as `on_token`. number: ignored, there is only one text."""
        self.tokens.append(token)
        text = self.text_of(self.tokens)
        if not text.endswith("\ufffd"):  # otherwise a character is incomplete
            self._write(text)

    def end(self, whole: str) -> None:
        """Shows the rest of the whole text."""
        if whole != self.written:
            self._write(whole)

    def _write(self, text: str) -> None:
        self.show(text[len(self.written) :])
        self.written = text
