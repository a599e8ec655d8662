"""Prompts to tokens, and texts that are shown while they grow, for every program that generates.

Next: generate.py, which makes the tokens.
"""

from collections.abc import Callable, Iterable, Sequence

from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec


def as_sources(
    spec: TransformerSpec, tokenizer: Tokenizer, prompts: Sequence[list[int]]
) -> list[list[int]]:
    """The prompts as the model's inputs: of an encoder-decoder sources, which the end of document closes. ConfigError
    for a tokenizer without one."""
    if spec.stacks is None:
        return list(prompts)
    if tokenizer.eod_id is None:
        rule = f"has no end-of-sequence token, which ends a {spec.family} model's source"
        raise ConfigError(f"--tokenizer: {rule}")
    return [[*prompt, tokenizer.eod_id] for prompt in prompts]


def check_ids(spec: TransformerSpec, rows: Iterable[Sequence[int]]) -> None:
    """ConfigError where a tokenizer gives ids that the model does not have."""
    highest = max((max(row, default=0) for row in rows), default=0)
    if highest >= spec.vocabulary_size:
        raise ConfigError(
            f"--tokenizer: gives id {highest}: must be below the model's vocab_size {spec.vocabulary_size}"
        )


class Growing:
    """A text that is shown while it grows.

    text_of: the text of the tokens so far; show: takes each new piece of it, once its characters are whole.
    """

    def __init__(
        self, text_of: Callable[[Sequence[int]], str], show: Callable[[str], None]
    ) -> None:
        self.text_of, self.show = text_of, show
        self.tokens: list[int] = []
        self.written = ""

    def add(self, number: int, token: int) -> None:
        """The next token; called as `on_token` is. number: of the text, of which there is one."""
        self.tokens.append(token)
        text = self.text_of(self.tokens)
        if not text.endswith("\ufffd"):  # else a character is not whole yet
            self._write(text)

    def end(self, whole: str) -> None:
        """Shows what is left of the whole text."""
        if whole != self.written:
            self._write(whole)

    def _write(self, text: str) -> None:
        self.show(text[len(self.written) :])
        self.written = text
