"""The model as a list of layers, cut into chunks, and the stage of a rank: the chunks that it holds.

    embedding, layer 0 … layer L-1, head

One hidden tensor [B, S, D] goes from each to the next, within a chunk and across chunks; with sequence parallelism
a rank of the tensor axis has [B, S / t, D] of it. Pipe 1 is the case of one stage with one chunk; there is no second
way to build or run the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from megalite.model.attention import Attention
from megalite.model.chunks import Cut
from megalite.model.classifier import Classifier
from megalite.model.context import Context
from megalite.model.dropout import drop
from megalite.model.experts import RoutedMLP
from megalite.model.layers import MLP, Norm, Transform
from megalite.model.router import Router
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split, enter
from megalite.parallel.deferred import WeightGradients, give, later
from megalite.parallel.grid import Grid
from megalite.parallel.layers import (
    VocabularyEmbedding,
    initialise,
    name_parameters,
    parameter,
    placed,
)
from megalite.parallel.loss import head_loss

TIED_NAME = "embedding.tokens.weight"
EXPERTS = "experts"  # DeepSpeed's name for what an expert axis splits


class Embedding(nn.Module):
    """Token ids [B, S] -> hidden [B, S or S / t, D]: learned positions and a token type are added, and a norm follows,
    where the model has them."""

    def __init__(self, spec: TransformerSpec, split: Split) -> None:
        super().__init__()
        self.split, self.dropout = split, spec.embedding_dropout
        std = spec.embedding_init_std or spec.init_std
        self.tokens = VocabularyEmbedding(
            spec.vocabulary_size, spec.hidden_size, split, std, spec.padding_id
        )
        self.position_offset, self.positions, self.types = spec.position_offset, None, None
        if spec.rotary is None:
            self.positions = parameter(
                (spec.position_rows, spec.hidden_size), None, split.axis, std
            )
        if spec.token_types:
            self.types = parameter((spec.token_types, spec.hidden_size), None, split.axis, std)
        self.norm = (
            Norm(spec, split.axis, spec.hidden_size, split.users) if spec.embedding_norm else None
        )

    def forward(self, ids: Tensor, context: Context) -> Tensor:
        hidden, rows = self.tokens(ids), self.split.rows(ids.shape[1])
        if self.positions is not None:
            table = enter(later(self.positions), self.split.users)
            hidden = hidden + self._of_positions(table, ids, context, rows)
        if self.types is not None:
            hidden = hidden + enter(later(self.types), self.split.users)[0]
        if self.norm is not None:
            hidden = self.norm(hidden)
        numbers = context.row_numbers(rows, ids.device)
        return drop(hidden, context.randomness, "embedding", self.dropout, numbers)

    def _of_positions(self, table: Tensor, ids: Tensor, context: Context, rows: range) -> Tensor:
        """Rows of the table of positions for this rank's part of the tokens."""
        if not self.position_offset:
            return table[context.places(ids.shape[1], ids.device)[:, rows.start : rows.stop]]
        padding = self.position_offset - 1
        places = context.counted_places(ids != padding) + padding
        return F.embedding(places[:, rows.start : rows.stop], table, padding)


class Block(nn.Module):
    """Attention and MLP, each added to the hidden states, with norms where the family has them.
    [B, S or S / t, D] -> the same."""

    def __init__(
        self,
        spec: TransformerSpec,
        layer: int,
        split: Split,
        recompute_attention: bool,
        grid: Grid,
    ) -> None:
        super().__init__()
        self.spec, self.layer, self.split = spec, layer, split
        size, users = spec.hidden_size, split.users
        self.attention_norm = (
            Norm(spec, split.axis, size, users) if layer or spec.first_norm else nn.Identity()
        )
        self.attention = Attention(spec, layer, split, recompute_attention)
        self.mlp_norm = None if spec.shared_norm else Norm(spec, split.axis, size, users)
        mixture = spec.mixture_of(layer)
        if mixture is None:
            self.mlp = MLP(spec, split)
        else:
            self.mlp = RoutedMLP(spec, mixture, split, grid.expert, grid.context)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        mlp_norm = self.mlp_norm or self.attention_norm
        if self.spec.norm_place == "after":  # OLMo 2
            hidden = hidden + self._drop(
                self.attention_norm(self.attention(hidden, context)), context, "attention"
            )
            return hidden + self._drop(mlp_norm(self._fed(hidden, context)), context, "mlp")
        if self.spec.norm_place == "sum":  # BERT
            hidden = self.attention_norm(
                hidden + self._drop(self.attention(hidden, context), context, "attention")
            )
            return mlp_norm(hidden + self._drop(self._fed(hidden, context), context, "mlp"))
        normed = self.attention_norm(hidden)
        mixed = self._drop(self.attention(normed, context), context, "attention")
        if self.spec.parallel:  # GPT-J, GPT-NeoX, Phi
            normed = normed if self.spec.shared_norm else mlp_norm(hidden)
            return hidden + mixed + self._drop(self._fed(normed, context), context, "mlp")
        hidden = hidden + mixed
        return hidden + self._drop(self._fed(mlp_norm(hidden), context), context, "mlp")

    def _fed(self, hidden: Tensor, context: Context) -> Tensor:
        """Through the MLP or the experts."""
        if isinstance(self.mlp, RoutedMLP):
            return self.mlp(hidden, context)
        return self.mlp(hidden)

    def _drop(self, added: Tensor, context: Context, part: str) -> Tensor:
        if part == "mlp" and not self.spec.drops_mlp:
            return added
        if context.randomness is None or self.spec.hidden_dropout == 0:
            return added
        length = added.shape[1] * (self.split.axis.size if self.split.divides else 1)
        rows = context.row_numbers(self.split.rows(length), added.device)
        place = f"layers.{self.layer}.{part}.output"
        return drop(added, context.randomness, place, self.spec.hidden_dropout, rows)


class Head(nn.Module):
    """Final norm, transform and the product with the output embedding: hidden [B, S or S / t, D] -> logits
    [B, S, V / t], or with labels [B, S] the sum of the losses.

    `weight` is the embedding's own parameter where both are on one rank and tied; on another rank a copy
    under the same name, which the engine keeps equal by summing both gradients.
    """

    def __init__(
        self, spec: TransformerSpec, split: Split, tied_to: nn.Parameter | None, z_loss: float
    ) -> None:
        super().__init__()
        self.split, self.vocabulary_size, self.z_loss = split, spec.vocabulary_size, z_loss
        self.norm = (
            Norm(spec, split.axis, spec.hidden_size, split.users) if spec.final_norm else None
        )
        self.transform = Transform(spec, split) if spec.head_transform else None
        if tied_to is None:
            std = spec.embedding_init_std if spec.tied else None
            tied_to = parameter(
                (spec.vocabulary_size, spec.hidden_size), 0, split.axis, std or spec.init_std
            )
        self.weight = tied_to
        self.bias = (
            parameter((spec.vocabulary_size,), 0, split.axis, None) if spec.head_bias else None
        )

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """counted: as of `Context`."""
        for part in (self.norm, self.transform):
            hidden = hidden if part is None else part(hidden)
        hidden = self.split.enter(hidden)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        weight, bias = later(self.weight), None if self.bias is None else later(self.bias)
        return head_loss(
            hidden,
            weight,
            bias,
            labels,
            self.vocabulary_size,
            self.split.axis,
            self.z_loss,
            counted,
        )


Recompute = bool | int | Literal["selective"]
"""What is computed again in backward instead of being kept: nothing (False, 0), groups of so many layers, of which
the input alone is kept (True is 1), or the core of attention."""


class Chunk(nn.Module):
    """A run of the model's layers, each with its tensor-axis slice. first: it has the embedding; last: the head.

    Input: token ids [B, S] if it is the first, else hidden [B, S or S / t, D]. Output: hidden; of the last one with
    labels [B, S] the sum of the losses (fp32 scalar), without them logits [B, S, V / t], with a cache those of the last
    position alone, [B, 1, V / t]; of a classifier see classifier.py. tied_to: the embedding of another chunk of this
    rank, for a tied head.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        layers: range,
        first: bool,
        last: bool,
        split: Split,
        recompute: Recompute,
        z_loss: float,
        tied_to: nn.Parameter | None,
        grid: Grid,
    ) -> None:
        super().__init__()
        self.spec, self.split = spec, split
        self.recompute_every = 0 if recompute == "selective" else int(recompute)
        self.embedding = Embedding(spec, split) if first else None
        if self.embedding is not None:
            name_parameters(self.embedding, "embedding")
        self.blocks = nn.ModuleDict()
        for layer in layers:
            block = Block(spec, layer, split, recompute == "selective", grid)
            name_parameters(block, f"layers.{layer}")
            self.blocks[str(layer)] = block
        self.head: Head | Classifier | None = None
        if last and spec.classifier is not None:
            self.head = Classifier(spec, split)
        elif last:
            if self.embedding is not None:
                tied_to = self.embedding.tokens.weight
            self.head = Head(spec, split, tied_to if spec.tied else None, z_loss)
            self._name_head(self.head, is_copy=tied_to is None)

    def _name_head(self, head: Head, is_copy: bool) -> None:
        name_parameters(head, "head")
        if head.norm is not None:
            name_parameters(head.norm, "final_norm")
        if self.spec.tied:
            head.weight.placement.name = TIED_NAME  # type: ignore[union-attr]
            if is_copy:  # the embedding is the one that counts
                head.weight.placement.counted = False  # type: ignore[union-attr]

    def forward(self, x: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        hidden = self.embedding(x, context) if self.embedding is not None else x
        blocks, every = list(self.blocks.values()), self.recompute_every
        for first in range(0, len(blocks), every or max(1, len(blocks))):
            group = blocks[first : first + every] if every else blocks
            if every and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(
                    _in_turn, group, hidden, context, use_reentrant=False
                )
            else:
                hidden = _in_turn(group, hidden, context)
        if self.head is None:
            return hidden
        if isinstance(self.head, Classifier):
            return self.head(hidden, labels, context)
        if context.cache is not None:  # generation: nothing else is read
            hidden = hidden[:, -1:]
        return self.head(hidden, labels, context.counted)


class Stage(nn.Module):
    """What one rank holds of the model: one or several chunks of its layers (chunks.py).

    cut: which layers are a chunk, and where each is; None: all layers on this rank, which is the whole pipe axis.
    sequence: sequence parallelism over the tensor axis, whose size must divide S. Dropout acts in training, where
    the context carries its randomness. z_loss as in parallel/loss.py.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        grid: Grid,
        cut: Cut | None = None,
        recompute: Recompute = False,
        sequence: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.grid, self.split = spec, grid, Split(grid.tensor, sequence)
        assert cut is not None or grid.pipe.size == 1, "several stages need a cut"
        self.cut = cut or Cut((0,), (range(spec.num_layers),))
        self.chunks = nn.ModuleDict()
        for number in self.cut.chunks_of(grid.pipe.rank):
            first, last, layers = (
                number == 0,
                number == self.cut.last_chunk,
                self.cut.layers[number],
            )
            tied_to = None if self.embedding is None else self.embedding.tokens.weight
            self.chunks[str(number)] = Chunk(
                spec, layers, first, last, self.split, recompute, z_loss, tied_to, grid
            )

    @property
    def embedding(self) -> Embedding | None:
        """None where the first chunk is on another rank."""
        return next(
            (chunk.embedding for chunk in self.chunks.values() if chunk.embedding is not None), None
        )  # type: ignore[union-attr]

    @property
    def head(self) -> Head | Classifier | None:
        """None where the last chunk is on another rank."""
        return next((chunk.head for chunk in self.chunks.values() if chunk.head is not None), None)  # type: ignore[union-attr]

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Of the product with the output embedding, or with a classifier's labels; empty where the head is on another
        rank."""
        head = self.head
        return (
            []
            if head is None
            else [value for value in (head.weight, head.bias) if value is not None]
        )

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Shape of what the last chunk gives in an evaluation: the sum of the losses, with a classifier's counts."""
        classifier = self.spec.classifier
        return () if classifier is None else (1 + len(classifier.labels) ** 2,)

    @property
    def tied_parameter(self) -> nn.Parameter | None:
        """The copy of the tied embedding that another rank holds too; None where there is no other."""
        if not self.spec.tied or len(self.cut.ends) == 1:
            return None
        if self.embedding is not None:
            return self.embedding.tokens.weight
        return self.head.weight if self.head is not None else None

    def initialise(self, seed: int) -> "Stage":
        """Initial weights by (seed, name), and DeepSpeed's marks of what the tensor and the expert axis split."""
        initialise(self, seed)
        for value, placement in placed(self):
            value.model_parallel = placement.is_cut_by("tensor")  # type: ignore[attr-defined]
            if placement.has_own_replicas:
                value.allreduce = False  # type: ignore[attr-defined]
                value.group_name = EXPERTS  # type: ignore[attr-defined]
        return self

    @property
    def routers(self) -> dict[int, Router]:
        """The routers of this rank's layers that have experts."""
        chunks: Any = self.chunks.values()
        blocks = [block for chunk in chunks for block in chunk.blocks.values()]
        return {
            block.layer: block.mlp.router for block in blocks if isinstance(block.mlp, RoutedMLP)
        }

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what crosses to the next chunk for `batch` samples of `length` tokens."""
        rows = self.split.rows(length // self.grid.context.size)
        return batch, len(rows), self.spec.hidden_size

    def forward(
        self,
        x: Tensor | WeightGradients,
        labels: Tensor | None = None,
        context: Context | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """One chunk's forward (see Chunk); chunk: its number, None: the only one. Of WeightGradients, which a backward
        to the input has left: a scalar whose backward gives them to the parameters."""
        if isinstance(x, WeightGradients):
            return give(x)
        training = self.training and torch.is_grad_enabled()
        context = replace(context or Context(), shared={})
        if not training:
            context.randomness = None
        assert context.randomness is not None or not training or self.spec.dropout == 0, (
            "dropout needs randomness"
        )
        if chunk is None:
            (only,) = self.chunks.values()
            return only(x, labels, context)
        return self.chunks[str(chunk)](x, labels, context)


def _in_turn(blocks: Sequence[nn.Module], hidden: Tensor, context: Context) -> Tensor:
    for block in blocks:
        hidden = block(hidden, context)
    return hidden
