"""Masked language modelling (arXiv 1810.04805, section 3.1): which tokens of a sample are predicted, and what replaces
them.

All of it is a pure function of the run's seed, the sample's number in the run and the position in the sample. So masks
are new in each epoch, and equal on every layout, for every micro-batch size and after a restart; evaluation numbers its
samples from 0 under a seed of its own. Of a whole word (words.py) the position is that of its first token. A share that
changes over a run is compared with the same draws. Next: batch.py.
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
_CHOSEN, _KIND, _OTHER = range(3)  # what is drawn of each position


class Masking:
    """An objective with its tokens. share: of the tokens that are predicted."""

    def __init__(
        self,
        objective: Masked,
        mask_id: int,
        special_ids: list[int],
        ids: int,
        seed: int,
        words: Words | None = None,
    ) -> None:
        """`special_ids` are never predicted, nor do they replace another; `ids`: a random token is below this; seed: of
        the masks; words: None where tokens are masked one by one."""
        self._objective, self._mask_id, self._seed = objective, mask_id, seed
        self.share, self.words = objective.ends[0], words
        self._special = np.array(sorted({mask_id, *special_ids}), np.int64)
        self._others = np.setdiff1d(np.arange(ids), self._special)
        self.ids = {
            "mask token": mask_id,
            "special tokens": sorted({*special_ids}),
            "number of ids": ids,
        }
        """All that a tokenizer decides of the masks, beside words: by its name, for a run's fingerprint."""

    def at_step(self, step: int, steps: int) -> "Masking":
        """The same with the share of a step of a run of so many."""
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
        """Masks a batch in place. tokens and labels int64 [B, S], the labels the tokens themselves, or -100 where there
        is none to ask for; numbers int64 [B]: of the samples in the run; documents [B, S]: as of a batch."""
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
        """64 random bits of each position, uint64 [B, S]."""
        rows = hashed(numbers.astype(np.uint64), mixed(self._seed, what))
        return hashed(rows[:, None] + np.arange(1, shape[1] + 1).astype(np.uint64) * STEP, what)


def _below(draws: np.ndarray, share: float) -> np.ndarray:
    """Where a number in [0, 1) is below a share. Of 53 bits, which a double holds exactly."""
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def masking_of(data: Data, vocabulary_size: int, seed: int, last: bool) -> Masking | None:
    """Of a config, with the share of the run's last step or its first; None where nothing is masked. Raises ConfigError
    where a token that it needs is missing."""
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
        raise ConfigError(f"{KEY}.special_token_ids: must leave some of the {ids} ids")
    words = None
    if objective.whole_word and tokenizer is not None:
        words = words_of(tokenizer, vocabulary_size, [mask_id, *(special or [])])
        if words is None:
            rule = (
                f"the tokens of {data.tokenizer} do not show where words begin, as WordPiece's do"
            )
            raise ConfigError(f"{KEY}.whole_word: true: {rule}")
    masking = Masking(objective, mask_id, special or [], ids, seed, words)
    masking.share = objective.ends[last]
    return masking
