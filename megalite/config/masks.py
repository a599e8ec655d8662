"""The keys of the masked objective of `megalite.data`; data/masking.py implements it. Next: sections.py."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Counter, Section, Share

MaskedShare = Annotated[float, Field(gt=0, lt=1)]
TwoShares = Annotated[list[MaskedShare], Field(min_length=2, max_length=2)]


def _masked(value: Any) -> Any:
    shares = value if isinstance(value, list) and len(value) == 2 else [value]
    if all(isinstance(share, float) and 0 < share < 1 for share in shares):
        return value
    rule = "must be above 0 and below 1, or two such numbers, for the first and the last step"
    raise PydanticCustomError("masked", rule)


class Masked(Section):
    """Masked language modelling, for encoders: some tokens are hidden, and the model predicts them. They are
    drawn again in each epoch, the same on every layout and after a restart; special tokens are never masked."""

    masked: Annotated[MaskedShare | TwoShares, BeforeValidator(_masked)] = Field(
        description="Share of the tokens to predict, such as 0.15; or the shares of the first and the last step, such "
        "as `[0.3, 0.15]`, with linear interpolation between them. Evaluation uses the last step's.",
    )
    whole_word: bool = Field(
        False,
        description="Predict all tokens of a word or none; needs a tokenizer whose tokens show where words begin.",
    )
    keep: Share = Field(0.1, description="Share of the predicted tokens that stay unchanged.")
    swap: Share = Field(
        0.1,
        description="Share of the predicted tokens that are replaced by a random token; the rest are masked.",
    )
    mask_token_id: Counter | None = Field(
        None,
        description="The token that replaces a masked one; left out: the tokenizer's mask token.",
    )
    special_token_ids: list[Counter] | None = Field(
        None,
        description="Tokens that are never predicted, apart from the mask token; left out: the tokenizer's special "
        "tokens.",
    )

    @property
    def ends(self) -> tuple[float, float]:
        """The shares of the first and the last step."""
        first, last = self.masked if isinstance(self.masked, list) else (self.masked, self.masked)
        return first, last

    def share(self, step: int, steps: int) -> float:
        """The share at step `step`, from 0, of a run of `steps`."""
        first, last = self.ends
        return first + (last - first) * min(1.0, step / max(1, steps - 1))
