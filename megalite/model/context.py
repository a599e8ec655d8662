"""What a forward pass knows beside the hidden states: which positions its tokens have, what they may look at, and
the numbers that its dropout is drawn from. Next: layers.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite.model.dropout import Randomness
from megalite.model.varlen import Bounds, RunPieces, rows_as_pieces, rows_of_runs
from megalite.parallel.rows import Rows


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, by layer, for generation. A layer's room for `capacity`
    positions is made once: growing by concatenation copies all of it for each token. sources: those of an encoder's
    source, by the layer that looks at them."""

    capacity: int
    entries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    sources: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions seen so far."""
        return next(iter(self.lengths.values()), 0)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, K / t, S, H] and returns all of the layer's, [B, K / t, T, H], as views."""
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
        """Makes row i of each layer what row rows[i] was; rows [B] int64."""
        for layer, (keys, values) in self.entries.items():
            stop = self.lengths[layer]
            keys[:, :, :stop], values[:, :, :stop] = keys[rows, :, :stop], values[rows, :, :stop]


@dataclass
class Context:
    """B samples of S tokens; T positions seen so far (S without a cache).

    positions [B, S] int64; None means 0 … S-1, from the start of each document where there are documents.
    documents [B, S] int64: which document of its sample a token belongs to, in runs; a token looks at its own alone.
    bounds: the documents as pieces, where they are known without waiting for a device.
    counted [n] int64: which of the B·S labels count, where the host knows it; the head works on those alone.
    prefixes [B, S] bool: tokens at the start of their document, or sample, that all of it may look at, and which look
    at each other both ways; halves: the prefixes as pieces, with others between them, where those are known.
    lengths [B] int64: tokens of each row, of rows that are filled up to the longest; None means all S.
    visible [B, 1, S, T] bool: which positions a token may look at; None means those before it and itself, in an encoder
    all.
    cache: for generation. randomness: for dropout, which without it is off; every stage needs the same.
    rows: which tokens of the samples these are, where the context axis divides them: S is then a rank's part of them, T
    the whole samples, which `documents` and `bounds` are about. run_pieces: the documents of these tokens as pieces.
    balance [B] fp32: what the router's losses of each sample are multiplied with in training, 0 for samples that fill a
    micro-batch; None: they are left out.
    source: of an encoder-decoder, how many of a sample's S tokens are the source, which come first; the rest is the
    target. `counted` is then about the target's labels, and `documents` tells filling of the source, which is in
    another document than the first token and which nothing looks at. source_visible [B, 1, 1, source] bool: the same
    where there are no documents, for generation, where later passes have no source.
    shared: what the layers of one forward pass share (angles, masks); the stage begins each with an empty one.
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
        """Tokens of a sample, of which these are s."""
        return s if self.rows is None else self.rows.length

    def _own(self, whole: Tensor) -> Tensor:
        """These tokens' part of [B or 1, S of the samples]."""
        return whole if self.rows is None else self.rows.cut(whole, 1)

    def row_numbers(self, part: range, device: torch.device) -> range | Tensor:
        """Where in their samples those of these tokens are that are numbered `part`."""
        if self.rows is None:
            return part
        return self.rows.index(device)[part.start : part.stop]

    def counted_places(self, counts: Tensor) -> Tensor:
        """The how manieth of its document's tokens that count each is, from 1 on; 0 for those that do not. counts and
        result [B, S]."""
        if self.rows is not None:
            counts = self.rows.gathered(counts.long())
        so_far = counts.cumsum(dim=1)
        if self.documents is not None:
            begins = torch.ones_like(counts)
            begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
            so_far = so_far - ((so_far - counts.long()) * begins).cummax(dim=1).values
        return self._own(so_far * counts)

    def known_span(self, s: int) -> int | None:
        """The one value of `spans`, where the host knows it without asking a device."""
        given = (self.positions, self.documents, self.lengths)
        return self._all(s) if all(values is None for values in given) else None

    def spans(self, s: int, device: torch.device) -> Tensor:
        """Tokens of the sequence that each token is part of, its document's or its row's, int64 [B or 1, S or 1]."""
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
        """What a token looks at, those of its piece of [B, S], in a decoder itself and those before it; None where that
        is not so, or not known."""
        if self.visible is not None or self.cache is not None or self.documents is not None:
            return self.bounds
        key = ("rows", b, s)
        if key not in self.shared:
            self.shared[key] = (rows_as_pieces(b, s, device).starts,)
        return Bounds(self.shared[key][0], s)

    def pieces_of_runs(self, b: int, device: torch.device) -> tuple[RunPieces, ...] | None:
        """The same where the context axis divides [B, S of the samples]."""
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
        """Which of T positions each of the last S, or of `rows`, may look at, bool [B or 1, 1, S, T]; None: all before
        it and itself, where S = T, or without `causal` all, which needs no mask. window: positions that it sees, itself
        included, to each side without `causal` and in prefixes. Made once for all layers with that window."""
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
            # What may be seen by its direction, then what is near enough, then what is in the same document.
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
