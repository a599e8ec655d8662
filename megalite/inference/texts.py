"""Prompts to tokens and tokens to the text that continues them, for every program that generates.

Next: generate.py, which makes the tokens.
"""

from collections.abc import Collection, Iterable, Sequence

from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt as transformers gives them to a model: with the token that the tokenizer puts before a
    text, where it puts one."""
    ids = tokenizer.encode(prompt)
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.bos_id is not None:
        first = tokenizer.inner(prompt)["input_ids"][:1]
        if first == [tokenizer.bos_id] and ids[:1] != first:
            return first + ids
    return ids


def continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Collection[int] = ()
) -> str:
    """The text that tokens add to a prompt's: decoded together, since a token's text depends on its neighbours."""
    kept = [token for token in tokens if token not in stop]
    start, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *kept])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(kept)


def check_ids(spec: TransformerSpec, rows: Iterable[Sequence[int]]) -> None:
    """ConfigError where a tokenizer gives ids that the model does not have."""
    highest = max((max(row, default=0) for row in rows), default=0)
    if highest >= spec.vocabulary_size:
        raise ConfigError(
            f"--tokenizer: gives id {highest}: must be below the model's vocab_size {spec.vocabulary_size}"
        )
