"""Prompts to tokens and tokens to the text that continues them, for every program that generates.

Next: generate.py, which makes the tokens.
"""

from collections.abc import Collection, Iterable, Sequence

from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec


def continuation(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop: Collection[int] = (),
    is_source: bool = False,
) -> str:
    """The text that tokens add to a prompt's: decoded together, since a token's text depends on its neighbours.
    is_source: of an encoder-decoder's prompt, whose tokens are a text of their own."""
    prompt = () if is_source else prompt
    kept = [token for token in tokens if token not in stop]
    start, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *kept])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(kept)


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
