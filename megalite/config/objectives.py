"""Objectives other than the next token and masked tokens: `megalite.data.objective` as sections of the JSON.

Classifiers predict labels of texts; encoder-decoders predict the target of a source, from pairs or by span corruption.
Masked language modelling is in masks.py.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from megalite.config.section import Counter, Section

Length = Annotated[int, Field(ge=2)]


class Classes(Section):
    """Classification: the model predicts the label of each text. The texts are whole documents, `packed` or `padded`,
    of a corpus that tools/preprocess_data.py --label-key made."""

    classes: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=2,
        max_length=256,
        description="Names of the labels, in the order given to tools/preprocess_data.py --classes.",
    )


@dataclass(frozen=True)
class Classified:
    """The model section of a text classifier, with the names of its labels."""

    section: dict[str, Any] | str
    classes: tuple[str, ...]


class Pairs(Section):
    """Pairs of a source and its target, such as translations, for an encoder-decoder (t5). The corpus is one that
    tools/preprocess_data.py --pairs made; each sample is one pair."""

    source_length: Length = Field(
        description="Tokens of a sample for the source and its end token; the rest of "
        "`megalite.data.sequence_length` is for the target. Longer sources and targets are truncated."
    )
    start_token_id: Counter = Field(
        0, description="The token that targets begin with, the model's decoder_start_token_id."
    )


class Spans(Section):
    """Span corruption, for pretraining an encoder-decoder (t5): each chosen span of the text is replaced by a sentinel,
    and the target contains the spans. They are drawn again in each epoch, the same on every layout and after a
    restart."""

    span_corruption: float = Field(
        gt=0, lt=1, description="Share of the tokens to replace and predict, such as 0.15."
    )
    mean_span: float = Field(3.0, ge=1, le=1e6, description="Mean length of a span in tokens.")
    start_token_id: Counter = Field(
        0, description="The token that targets begin with, the model's decoder_start_token_id."
    )
    end_token_id: Counter | None = Field(
        None,
        description="The token that ends source and target; left out: the tokenizer's end of document.",
    )
    sentinel_token_ids: list[Counter] | None = Field(
        None,
        min_length=1,
        description="The token of the first span, of the second, …; left out: the tokenizer's <extra_id_0>, "
        "<extra_id_1>, ….",
    )


class SpanLengths(NamedTuple):
    """Lengths in tokens. text: tokens of the corpus in a sample; noise: those that are predicted, in `spans` spans;
    source, target: lengths of the two, with sentinels and the end token."""

    text: int
    noise: int
    spans: int

    @property
    def source(self) -> int:
        return self.text - self.noise + self.spans + 1

    @property
    def target(self) -> int:
        return self.noise + self.spans + 1


def span_lengths(objective: Spans, length: int) -> SpanLengths | None:
    """Lengths for the longest text whose source and target together fit into `length` tokens; None if none does.

    As in T5, every sample has the same number of tokens and spans (arXiv 1910.10683, section 3.1.4).
    """
    return _longest_text(objective.span_corruption, objective.mean_span, length)


@cache  # called at each step, and tries many lengths
def _longest_text(share: float, mean_span: float, length: int) -> SpanLengths | None:
    for text in range(length, 1, -1):
        noise = min(max(round(text * share), 1), text - 1)
        spans = min(max(round(noise / mean_span), 1), noise, text - noise)
        found = SpanLengths(text, noise, spans)
        if found.source + found.target <= length:
            return found
    return None
