"""Describes a corpus in lines for people: header, counts, lengths, documents, the tokens that are trained on
(marked_text.py), and the samples that a blend would take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalite.config.data_rules import LEAST_SHARE
from megalite.data.blend import Blend
from megalite.data.corpus_check import checksum_file, read_through, unknown_id_of
from megalite.data.indexed import CODES, IndexedCorpus, files_of, marks_prefix
from megalite.data.loader import check_marks
from megalite.data.marked_text import drawn, runs_of, shown
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.inputs import reading

_CHUNK = 1 << 20  # documents, or tokens, processed at a time
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Show:
    """What to show in addition to header, counts and lengths."""

    tokenizer: str | None = None
    vocabulary_size: int | None = None
    verify: bool = False
    documents: int = 2
    first: int = 0
    width: int = 200
    """Most characters shown of a document."""
    mask: bool = False
    """Show documents with the tokens that `PREFIX.mask` marks, in place of counts and lengths."""
    masked: float | None = None
    """Show documents with this share of their tokens drawn for masked language modelling."""
    columns: int = 80
    colour: bool = False
    weights: Sequence[float] | None = None
    """Weights of a blend, one per prefix."""
    samples: int = 10_000
    sequence_length: int = 1024


def inspect(prefixes: Sequence[str], show: Show) -> Iterator[str]:
    """The lines about some corpora. Raises DataError for a damaged corpus, ConfigError for invalid weights."""
    if show.weights is not None:
        _check_weights(show.weights, len(prefixes))
    tokenizer = load_tokenizer(show.tokenizer) if show.tokenizer else None
    vocabulary = show.vocabulary_size or (tokenizer.vocabulary_size if tokenizer else None)
    corpora = []
    for prefix in prefixes:
        with reading(prefix, DataError):
            corpus = IndexedCorpus(prefix)
            corpora.append(corpus)
            numbers = range(show.first, min(show.first + show.documents, corpus.num_documents))
            marking = show.mask or show.masked is not None
            if not marking:
                yield from describe(corpus)
            if show.verify:
                yield from verified(corpus, vocabulary)
            if marking:
                yield from marked_documents(corpus, numbers, tokenizer, show)
            else:
                yield from histogram(corpus)
                yield from documents(corpus, numbers, tokenizer, show.width)
    if show.weights is not None:
        yield from blend_table(corpora, show.weights, show.samples, show.sequence_length)


def _check_weights(weights: Sequence[float], prefixes: int) -> None:
    given = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != prefixes or not min(weights) > 0:
        raise ConfigError(f"--weights: {given}: must be {prefixes} numbers above 0, one per PREFIX")
    if min(weights) < LEAST_SHARE * sum(weights):
        raise ConfigError(f"--weights: {given}: each must be at least {LEAST_SHARE:g} of their sum")


def describe(corpus: IndexedCorpus) -> Iterator[str]:
    """Header and counts; also checks the index. Raises DataError if it is damaged."""
    corpus.check_index()
    kind = corpus.dtype.newbyteorder("=")
    yield f"{corpus.prefix}: indexed corpus, version 1, tokens {kind} (code {CODES[kind]})"
    yield f"  {corpus.num_tokens:,} tokens in {corpus.num_documents:,} documents and {corpus.num_sequences:,} sequences"
    yield f"  {corpus.index_path} {34 + 12 * corpus.num_sequences + 8 * len(corpus.document_index):,} bytes"
    yield f"  {corpus.tokens_path} {corpus.num_tokens * corpus.dtype.itemsize:,} bytes"


def histogram(corpus: IndexedCorpus) -> Iterator[str]:
    """Histogram of the documents' lengths in tokens, with a bar for each power of two."""
    counts, least, most = np.zeros(65, np.int64), corpus.num_tokens, 0
    for start in range(0, corpus.num_documents, _CHUNK):
        lengths = corpus.document_lengths(start, min(start + _CHUNK, corpus.num_documents))
        least, most = min(least, int(lengths.min())), max(most, int(lengths.max()))
        counts += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=65)
    mean = corpus.num_tokens / corpus.num_documents
    yield f"  tokens per document: {least:,} to {most:,}, {mean:,.1f} on average"
    used = np.flatnonzero(counts)
    for power in range(int(used[0]), int(used[-1]) + 1):
        low, high = (0, 0) if power == 0 else (1 << (power - 1), (1 << power) - 1)
        bar = "#" * round(_BAR * int(counts[power]) / int(counts.max()))
        yield f"  {low:>11,} to {high:>11,} {int(counts[power]):>13,}  {bar}".rstrip()


def documents(
    corpus: IndexedCorpus, numbers: Sequence[int], tokenizer: Tokenizer | None, width: int
) -> Iterator[str]:
    """Some documents, as text truncated to `width` characters if there is a tokenizer, else as token ids."""
    for number in numbers:
        ids = corpus.document(number)
        yield f"  document {number}, {len(ids):,} tokens:"
        if tokenizer is None:
            shown = " ".join(map(str, ids[: width // 4].tolist()))
        else:
            text = tokenizer.decode(ids[:width].tolist(), skip_special_tokens=False)
            shown = repr(text[:width])
        yield f"    {shown}"


def marked_documents(
    corpus: IndexedCorpus, numbers: Sequence[int], tokenizer: Tokenizer | None, show: Show
) -> Iterator[str]:
    """Some documents with the tokens that are trained on, and their share of the corpus. Raises ConfigError if there
    are no marks, DataError for marks that do not fit the corpus."""
    yield f"{corpus.prefix}: {corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens"
    marks = None if show.masked is not None else _marks_of(corpus)
    if marks is not None:
        tokens = marks.tokens
        parts = range(0, len(tokens), _CHUNK)
        count = sum(int(np.count_nonzero(tokens[start : start + _CHUNK])) for start in parts)
        yield f"  trained on: {_share(count, corpus.num_tokens)}"
    for number in numbers:
        ids = corpus.document(number)
        if show.masked is not None:
            of_document = drawn(ids, number, show.masked, tokenizer)
        else:
            assert marks is not None
            of_document = marks.document(number)
        yield f"  document {number}: {_share(int(of_document.sum()), len(ids))}"
        first = ids[
            : 4 * show.width + 1
        ].tolist()  # a character takes at most 4 tokens, one per byte
        runs = runs_of(first, of_document[: len(first)], tokenizer)
        yield from shown(runs, show.width, show.columns, show.colour) if first else ()


def _share(count: int, tokens: int) -> str:
    return f"{count:,} of {tokens:,} tokens, {count / max(tokens, 1):.1%}"


def _marks_of(corpus: IndexedCorpus) -> IndexedCorpus:
    """The marks of a corpus, which preprocess wrote."""
    prefix = marks_prefix(corpus.prefix)
    if not files_of(prefix)[0].exists():
        rule = "must exist along with the corpus; preprocess --chat and --pairs write it"
        raise ConfigError(f"--mask: {files_of(prefix)[0]}: missing: {rule}")
    marks = IndexedCorpus(prefix)
    check_marks(marks, corpus)
    return marks


def verified(corpus: IndexedCorpus, vocabulary_size: int | None) -> Iterator[str]:
    """Checks a corpus completely. Raises DataError with the file and the position in it."""
    lowest, highest = read_through(corpus)
    if lowest < 0 or (vocabulary_size is not None and highest >= vocabulary_size):
        raise unknown_id_of(corpus, vocabulary_size or highest + 1)
    sums = "checksums" if checksum_file(corpus.prefix).exists() else "no checksum file"
    limit = "" if vocabulary_size is None else f", below the vocabulary's {vocabulary_size:,}"
    yield f"  verified: structure, sizes, pointers, {sums}; token ids {lowest:,} to {highest:,}{limit}"


def blend_table(
    corpora: Sequence[IndexedCorpus], weights: Sequence[float], samples: int, sequence_length: int
) -> Iterator[str]:
    """The samples that a run of `samples` samples takes from each corpus."""
    blend = Blend(weights)
    yield f"blend of {len(corpora)} corpora, {samples:,} samples of {sequence_length:,} tokens:"
    yield f"  {'requested':>9} {'actual':>9} {'samples':>13} {'epochs':>9}  corpus"
    for corpus, share, given in zip(corpora, blend.shares, blend.counts(samples), strict=True):
        windows = max(1, (corpus.num_tokens - 1) // sequence_length)
        actual = given / samples if samples else 0.0
        yield f"  {share:>9.4%} {actual:>9.4%} {given:>13,} {given / windows:>9.2f}  {corpus.prefix}"
