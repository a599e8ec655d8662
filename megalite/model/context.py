"""The inputs of a forward pass other than the hidden states: positions, attention masks and the randomness of dropout.
Next: norms.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite.model.dropout import Randomness
from megalite.model.varlen import Bounds, RunPieces, rows_as_pieces, rows_of_runs
from megalite.parallel.rows import Rows


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, by layer, for generation. Memory for `capacity` positions per layer
    is allocated once: concatenation would copy everything for each token. sources: keys and values of an encoder's
    output, by the decoder layer that attends to them."""

    capacity: int
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    sources: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of positions seen so far."""
        return next(iter(self.lengths.values()), 0)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, K / t, S, H] and returns all keys and values of the layer, [B, K / t, T, H], as views."""
        if layer not in self.entries:
            b, k, _, h = key.shape
            self.entries[layer] = (
                key.new_empty(b, k, self.capacity, h),
                value.new_empty(b, k, self.capacity, h),
            )
        start = self.lengths.get(layer, 0)
        stop = self.lengths[layer] = start + key.shape[2]
        keys, values = self.entries[layer]
        keys[:, :, start:stop], values[:, :, start:stop] = key, value
        return keys[:, :, :stop], values[:, :, :stop]

    def reorder(self, rows: Tensor) -> None:
        """Replaces row i of each layer by the former row rows[i]; rows [B] int64."""
        for layer, (keys, values) in self.entries.items():
            stop = self.lengths[layer]
            keys[:, :, :stop], values[:, :, :stop] = keys[rows, :, :stop], values[rows, :, :stop]


@dataclass
class Context:
    """B samples of S tokens; T positions seen so far (S without a cache).

    positions [B, S] int64: None means 0 … S-1, counted from the start of each document if there are documents.
    documents [B, S] int64: the number of each token's document in its sample, in runs; a token attends only to its own
    document. bounds: the documents as pieces, if they are known without synchronizing with a device.
    counted [n] int64: indices of the labels that count, of all B·S, if the host knows them; the head computes only
    those.
    prefixes [B, S] bool: tokens at the start of their document, or sample, that all its tokens may attend to, and which
    attend to each other in both directions; halves: the prefixes, and the tokens between them, as pieces, if known.
    lengths [B] int64: tokens in each row of a padded batch; None means all S.
    visible [B, 1, S, T] bool: positions that each token may attend to; None means itself and those before it, or all in
    an encoder.
    cache: for generation. randomness: for dropout, which is off without it; every stage needs the same.
    rows: with a context axis, the tokens of the samples that this rank holds. S is then the rank's part of a sample and
    T the whole sample, to which `documents` and `bounds` refer. run_pieces: the documents of this rank's tokens as
    pieces.
    balance [B] fp32: factor of the router's losses of each sample in training, 0 for samples that pad a micro-batch;
    None: no such losses.
    source: in an encoder-decoder, the number of source tokens among a sample's S tokens; they come first and the target
    follows. `counted` then refers to the target's labels, and `documents` marks padding of the source: tokens in
    another document than the first token's, which nothing attends to. source_visible [B, 1, 1, source] bool: the same
    mask if there are no documents, for generation, where later passes have no source.
    shared: values that the layers of one forward pass share (angles, masks); each pass starts with an empty dict.
    """

    positions: Tensor | None = None
    visible: Tensor | None = None
    cache: KeyValueCache | None = None
    documents: Tensor | None = None
    counted: Tensor | None = None
    bounds: Bounds | None = None
    prefixes: Tensor | None = None
    halves: Bounds | None = None
    lengths: Tensor | None = None
    randomness: Randomness | None = None
    rows: Rows | None = None
    run_pieces: tuple[RunPieces, ...] | None = None
    balance: Tensor | None = None
    source: int = 0
    source_visible: Tensor | None = None
    shared: dict[object, tuple[Any, ...]] = field(default_factory=dict, repr=False)

    def places(self, s: int, device: torch.device) -> Tensor:
        """Positions of the tokens, [B or 1, S] int64."""
        if self.positions is not None:
            return self.positions
        return self._own(self._all_places(self._all(s), device))

    def _all_places(self, s: int, device: torch.device) -> Tensor:
        """Positions of all tokens of the samples."""
        index = torch.arange(s, device=device).unsqueeze(0)
        if self.documents is None:
            return index
        begins = torch.ones_like(self.documents, dtype=torch.bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return index - (index * begins).cummax(dim=1).values

    def _all(self, s: int) -> int:
        """Number of tokens in a whole sample, of which this rank has `s`."""
        return s if self.rows is None else self.rows.length

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's part of [B or 1, S of the whole samples]."""
        return whole if self.rows is None else self.rows.cut(whole, 1)

    def row_numbers(self, part: range, device: torch.device) -> range | Tensor:
        """Indices in the whole sample of this rank's tokens number `part`."""
        if self.rows is None:
            return part
        return self.rows.index(device)[part.start : part.stop]

    def counted_places(self, counts: Tensor) -> Tensor:
        """The ordinal of each token, from 1, among the tokens of its document that count; 0 for tokens that do not.
        counts and result [B, S]."""
        if self.rows is not None:
            counts = self.rows.gathered(counts.long())
        so_far = counts.cumsum(dim=1)
        if self.documents is not None:
            begins = torch.ones_like(counts)
            begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
            so_far = so_far - ((so_far - counts.long()) * begins).cummax(dim=1).values
        return self._own(so_far * counts)

    def known_span(self, s: int) -> int | None:
        """The value of `spans` if it is a single one that the host knows without synchronizing; else None."""
        given = (self.positions, self.documents, self.lengths)
        return self._all(s) if all(values is None for values in given) else None

    def spans(self, s: int, device: torch.device) -> Tensor:
        """Number of tokens in each token's sequence, which is its document or its row, int64 [B or 1, S or 1]."""
        if self.positions is not None:
            return self.positions.max(dim=1, keepdim=True).values + 1
        if self.documents is None:
            if self.lengths is not None:
                return self.lengths.unsqueeze(-1)
            return torch.full((1, 1), self._all(s), device=device)
        s = self._all(s)
        places = self._all_places(s, device)
        ends = torch.ones_like(places, dtype=torch.bool)
        ends[:, :-1] = places[:, 1:] == 0
        index = torch.arange(s, device=device)
        next_end = torch.where(ends, index, s).flip(1).cummin(dim=1).values.flip(1)
        return self._own(places + (next_end - index) + 1)

    def pieces(self, b: int, s: int, device: torch.device) -> Bounds | None:
        """Pieces of [B, S] such that each token attends to its own piece, in a decoder only to itself and to earlier
        tokens in it; None if the mask is not of this form, or not known on the host."""
        if self.visible is not None or self.cache is not None or self.documents is not None:
            return self.bounds
        key = ("rows", b, s)
        if key not in self.shared:
            self.shared[key] = (rows_as_pieces(b, s, device).starts,)
        return Bounds(self.shared[key][0], s)

    def pieces_of_runs(self, b: int, device: torch.device) -> tuple[RunPieces, ...] | None:
        """`pieces` with a context axis, which divides [B, S of the whole samples]."""
        assert self.rows is not None
        if self.visible is not None or self.documents is not None:
            return self.run_pieces
        key = ("runs", b)
        if key not in self.shared:
            self.shared[key] = rows_of_runs(b, self.rows.length, self.rows.runs, device)
        return self.shared[key]

    def mask(
        self, window: int | None, s: int, t: int, device: torch.device, causal: bool
    ) -> Tensor | None:
        """The positions, of T, that each of the last S positions, or each of `rows`, may attend to, bool
        [B or 1, 1, S, T]. None if no mask is needed: for plain causal attention with S = T, or for all positions
        without `causal`. window: number of visible positions including the token itself; without `causal`, and in
        prefixes, to each side. Computed once for all layers with that window."""
        if window is not None and window >= t:
            window = None
        if (
            window is None
            and self.documents is None
            and self.prefixes is None
            and (self.visible is not None or s == t or not causal)
        ):
            return self.visible
        key = ("mask", window, s, t)
        if key not in self.shared:
            own = torch.arange(t - s, t, device=device)
            if self.rows is not None:
                own = self.rows.index(device)
            distance = own.unsqueeze(-1) - torch.arange(t, device=device)
            ahead = distance < 0
            # First the direction, then the distance, then the document.
            if not causal:
                mask = torch.ones_like(ahead)[None, None]
            elif self.prefixes is None:
                mask = ~ahead[None, None]
            else:
                mask = ~ahead | self.prefixes[:, None, None, :]
            if window is not None:
                mask = mask & (distance.abs() < window)
            if self.documents is not None:
                assert self._all(s) == t, "documents are for whole samples, not for a cache"
                own_documents = self._own(self.documents)
                mask = mask & (own_documents[:, None, :, None] == self.documents[:, None, None, :])
            self.shared[key] = (mask if self.visible is None else self.visible & mask,)
        return self.shared[key][0]
