"""A table of the tokens that begin a word, for whole-word masking, computed once per tokenizer.

In WordPiece, tokens that continue a word have the prefix "##". Other tokenizers encode a space as part of the word
after it ("Ġ" in byte-level tokenizers, "▁" in sentencepiece). There a token without a space may continue a word or
follow a bracket, for example: it continues a word if it begins with a letter or digit and the token before it ends with
one. In scripts without spaces such words are long. A special token is never part of a word. Next: masking.py.
"""

import hashlib
import re
import unicodedata
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizer import BYTES, SPACE, Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # sentencepiece's token for a byte


class Words(NamedTuple):
    """Tables, bool [ids]. begins: whether a token always begins a word; ends: whether the one after it always does."""

    begins: np.ndarray
    ends: np.ndarray

    def starts(self, tokens: np.ndarray, documents: np.ndarray | None) -> np.ndarray:
        """For each position, the position of its word's first token, int64 [B, S]. The first token of a sample or
        document begins a word. tokens [B, S]; documents [B, S]: as in a batch."""
        begins = self.begins[tokens]
        begins[:, 0] = True
        begins[:, 1:] |= self.ends[tokens[:, :-1]]
        if documents is not None:
            begins[:, 1:] |= documents[:, 1:] != documents[:, :-1]
        index = np.arange(tokens.shape[1])
        return np.maximum.accumulate(np.where(begins, index, 0), axis=1)

    def cut(self, before: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Whether each sample begins within a word. before, first: the token before each sample, and its first token;
        their ids need not have been checked."""
        before, first = (tokens.clip(0, len(self.ends) - 1) for tokens in (before, first))
        return ~self.begins[first] & ~self.ends[before]


def words_of(tokenizer: Tokenizer, ids: int, special_ids: list[int]) -> Words | None:
    """The tables for ids below `ids`; an id outside the tokenizer's vocabulary is a word by itself. None if tokens do
    not show where words begin."""
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


def _in_word(piece: str, index: int, of_bytes: bool) -> bool:
    """Whether the first (index 0) or last (-1) character of a token is part of a word."""
    if byte := _BYTE.fullmatch(piece):
        value = int(byte[1], 16)
    elif of_bytes:
        value = _ALPHABET.get(piece[index], ord(piece[index]))
    else:  # a letter, a combining mark, or a digit
        return unicodedata.category(piece[index])[0] in "LMN"
    return value >= 0x80 or chr(value).isalnum()  # a byte above ASCII is part of a character


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`): printable bytes
    are themselves, the others are characters 256, 257, …"""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    found = {chr(byte): byte for byte in shown}
    return found | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def words_hash(tokenizer: Tokenizer) -> str:
    """Hash of a tokenizer's tables, for a run's fingerprint: masks depend on them."""
    words = words_of(tokenizer, tokenizer.vocabulary_size, [])
    content = b"" if words is None else words.begins.tobytes() + words.ends.tobytes()
    return hashlib.sha256(content).hexdigest()
