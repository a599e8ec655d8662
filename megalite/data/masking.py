"""Masked language modelling (arXiv 1810.04805, section 3.1): chooses the tokens of a sample to predict, and their
replacements.

The choice is a pure function of the run's seed, the sample's number in the run and the position in the sample. So masks
are new in each epoch, and the same on every layout, for every micro-batch size and after a restart; evaluation numbers
its samples from 0 and has its own seed. For a whole word (words.py) the position is that of its first token. A share
that changes over a run is compared with the same draws. Next: batch.py.
"""

import copy

import numpy as np

from megalite.config import Data
from megalite.config.masks import Masked
from megalite.data.permutation import STEP, hashed, mixed
from megalite.data.tokenizer import load_tokenizer
from megalite.data.words import Words, words_of
from megalite.errors import ConfigError

UNCOUNTED = -100  # the label of a position that does not count in the loss
KEY = "megalite.data.objective"
_CHOSEN, _KIND, _OTHER = range(3)  # the purposes of draws for each position


class Masking:
    """A masked objective with its token ids. share: share of the tokens that are predicted."""

    def __init__(
        self,
        objective: Masked,
        mask_id: int,
        special_ids: list[int],
        ids: int,
        seed: int,
        words: Words | None = None,
    ) -> None:
        """special_ids: never predicted, and never used as a random replacement; ids: random tokens are below this;
        seed: of the masks; words: for whole-word masking, None to mask tokens one by one."""
        self._objective, self._mask_id, self._seed = objective, mask_id, seed
        self.share, self.words = objective.ends[0], words
        self._special = np.array(sorted({mask_id, *special_ids}), np.int64)
        self._others = np.setdiff1d(np.arange(ids), self._special)
        self.ids = {
            "mask token": mask_id,
            "special tokens": sorted({*special_ids}),
            "number of ids": ids,
        }
        """The ids that masks depend on, by name, for a run's fingerprint; words are not included."""

    def at_step(self, step: int, steps: int) -> "Masking":
        """The same masking with the share of step `step` in a run of `steps`."""
        changed = copy.copy(self)
        changed.share = self._objective.share(step, steps)
        return changed

    def apply(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        numbers: np.ndarray,
        documents: np.ndarray | None = None,
    ) -> None:
        """Masks a batch in place. tokens, labels int64 [B, S]: the labels are the tokens themselves, or -100 where
        nothing may be predicted; numbers int64 [B]: numbers of the samples in the run; documents [B, S]: as in a
        batch."""
        objective, shape = self._objective, tokens.shape
        draws = self._draw(_CHOSEN, numbers, shape)
        if self.words is not None:
            draws = np.take_along_axis(draws, self.words.starts(tokens, documents), axis=1)
        chosen = _below(draws, self.share)
        chosen &= (labels != UNCOUNTED) & ~np.isin(tokens, self._special)
        labels[~chosen] = UNCOUNTED
        kind = self._draw(_KIND, numbers, shape)
        swapped = chosen & _below(kind, objective.swap)
        kept = chosen & _below(kind, objective.swap + objective.keep) & ~swapped
        others = self._others[self._draw(_OTHER, numbers, shape) % np.uint64(len(self._others))]
        tokens[swapped] = others[swapped]
        tokens[chosen & ~swapped & ~kept] = self._mask_id

    def _draw(self, what: int, numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """64 random bits for each position, uint64 [B, S]."""
        rows = hashed(numbers.astype(np.uint64), mixed(self._seed, what))
        return hashed(rows[:, None] + np.arange(1, shape[1] + 1).astype(np.uint64) * STEP, what)


def _below(draws: np.ndarray, share: float) -> np.ndarray:
    """Whether the draws, as numbers in [0, 1), are below a share. Uses 53 bits, which a double represents exactly."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def masking_of(data: Data, vocabulary_size: int, seed: int, last: bool) -> Masking | None:
    """The masking of a config, with the share of the run's last step, or of its first; None for other objectives.
    Raises ConfigError if a token that it needs is missing."""
    objective = data.objective
    if not isinstance(objective, Masked):
        return None
    mask_id, special, ids = objective.mask_token_id, objective.special_token_ids, vocabulary_size
    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        ids = min(ids, tokenizer.vocabulary_size)
        mask_id = tokenizer.mask_id if mask_id is None else mask_id
        special = sorted(tokenizer.special_ids) if special is None else special
    if mask_id is None:
        rule = f"has no mask token: give {KEY}.mask_token_id or another tokenizer"
        raise ConfigError(f"megalite.data.tokenizer: {data.tokenizer}: {rule}")
    for name, values in (("mask_token_id", [mask_id]), ("special_token_ids", special or [])):
        if max(values, default=0) >= vocabulary_size:
            rule = f"must be below the model's vocab_size {vocabulary_size}"
            raise ConfigError(f"{KEY}.{name}: {max(values)}: {rule}")
    if len({mask_id, *(special or [])}) >= ids:
        raise ConfigError(
            f"{KEY}.special_token_ids: must leave some of the {ids} ids as ordinary tokens"
        )
    words = None
    if objective.whole_word and tokenizer is not None:
        words = words_of(tokenizer, vocabulary_size, [mask_id, *(special or [])])
        if words is None:
            rule = (
                f"the tokens of {data.tokenizer} do not show where words begin, unlike WordPiece's"
            )
            raise ConfigError(f"{KEY}.whole_word: true: {rule}")
    masking = Masking(objective, mask_id, special or [], ids, seed, words)
    masking.share = objective.ends[last]
    return masking
