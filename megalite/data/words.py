"""Which tokens begin a word, for masking whole words: a table, made once of a tokenizer.

WordPiece says it of each token: "##" is before those that continue a word. Other tokenizers write a space as a part
of the word after it ("Ġ" where tokens are of bytes, "▁" in sentencepiece). A token without a space may then continue
a word or follow a bracket: it continues one where it begins with a letter or digit and the token before it ends with
one. In scripts without spaces such words are long. A special token is no part of a word. Next: masking.py.
"""

import hashlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizer import BYTES, SPACE, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of sentencepiece for a byte


class Words(NamedTuple):
    """bool [ids] each. begins: a token begins a word wherever it is; ends: what follows it begins one."""

    begins: np.ndarray
    ends: np.ndarray

    def starts(self, tokens: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
        """Of each position that of its word's first token, int64 [B, S]. A sample's first token begins a word, and so
        does a document's. tokens [B, S]; documents [B, S]: as of a batch."""
        begins = self.begins[tokens]
        begins[:, 0] = True
        begins[:, 1:] |= self.ends[tokens[:, :-1]]
        if documents is not None:
            begins[:, 1:] |= documents[:, 1:] != documents[:, :-1]
        index = np.arange(tokens.shape[1])
        return np.maximum.accumulate(np.where(begins, index, 0), axis=1)

    def cut(self, before: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Where a sample whose first token is `first` begins within a word; before: the token before it. Of ids that
        were not checked."""
        before, first = (tokens.clip(0, len(self.ends) - 1) for tokens in (before, first))
        return ~self.begins[first] & ~self.ends[before]


def words_of(tokenizer: Tokenizer, ids: int, special_ids: list[int]) -> Words | None:
    """For ids below `ids`; one that the tokenizer does not have is a word by itself. None where tokens do not show
    what begins a word."""
    mark = tokenizer.word_mark
    if mark is None:
        return None
    begins, ends = np.ones(ids, bool), np.ones(ids, bool)
    for number, piece in enumerate(tokenizer.pieces()[:ids]):
        if not piece:
            continue
        if mark in (BYTES, SPACE):
            of_bytes = mark == BYTES
            begins[number] = not _in_word(piece, 0, of_bytes)
            ends[number] = not _in_word(piece, -1, of_bytes)
        else:
            begins[number], ends[number] = not piece.startswith(mark), False
    special = [number for number in {*tokenizer.special_ids, *special_ids} if number < ids]
    begins[special] = ends[special] = True
    return Words(begins, ends)


def _in_word(piece: str, place: int, of_bytes: bool) -> bool:
    """Whether the first (0) or last (-1) character of a token is one of a word."""
    if byte := _BYTE.fullmatch(piece):
        value = int(byte[1], 16)
    elif of_bytes:
        value = _ALPHABET.get(piece[place], ord(piece[place]))
    else:  # a letter, a mark over one, or a digit
        return unicodedata.category(piece[place])[0] in "LMN"
    return value >= 0x80 or chr(value).isalnum()  # above ASCII a byte is a part of a character


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary is (GPT-2's `bytes_to_unicode`): those that can be shown
    are themselves, the others are 256, 257, …"""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    found = {chr(byte): byte for byte in shown}
    return found | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def words_hash(tokenizer: Tokenizer) -> str:
    """Of a tokenizer's table, for a run's fingerprint: what words are decides what is masked."""
    words = words_of(tokenizer, tokenizer.vocabulary_size, [])
    content = b"" if words is None else words.begins.tobytes() + words.ends.tobytes()
    return hashlib.sha256(content).hexdigest()
