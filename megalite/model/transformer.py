"""The model as a list of layers, cut into chunks, and the stage of a rank: the chunks that it holds.

    embedding, layer 0 … layer L-1, head

One hidden tensor [B, S, D] goes from each to the next, within a chunk and across chunks; with sequence parallelism
a rank of the tensor axis has [B, S / t, D] of it. Of an encoder-decoder the tensor has the rows of the source and then
those of the target; an encoder's layer works on the first, a decoder's on the second with a look at the first. Pipe 1
is the case of one stage with one chunk; there is no second way to build or run the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from megalite.model.attention import Attention, CrossAttention
from megalite.model.chunks import Cut
from megalite.model.classifier import Classifier
from megalite.model.context import Context
from megalite.model.dropout import drop
from megalite.model.embedding import Embedding
from megalite.model.experts import RoutedMLP
from megalite.model.layers import MLP, Norm, Transform
from megalite.model.relative import (
    CROSS,
    DECODER,
    ENCODER,
    RelativeBias,
    bias_key,
    cross_bias,
    source_visible,
    taking_part,
)
from megalite.model.router import Router
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.deferred import WeightGradients, give, later
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import (
    initialise,
    name_parameters,
    parameter,
    placed,
)
from megalite.parallel.loss import head_loss

TIED_NAME = "embedding.tokens.weight"
EXPERTS = "experts"  # DeepSpeed's name for what an expert axis splits


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
        self.cross_norm, self.cross_attention = None, None
        if spec.is_cross(layer):
            self.cross_norm = Norm(spec, split.axis, size, users)
            self.cross_attention = CrossAttention(spec, layer, split, recompute_attention)
        self.mlp_norm = None if spec.shared_norm else Norm(spec, split.axis, size, users)
        mixture = spec.mixture_of(layer)
        if mixture is None:
            self.mlp = MLP(spec, layer, split)
        else:
            self.mlp = RoutedMLP(spec, mixture, split, grid.expert, grid.context)
        self.stack_norm = None
        if layer + 1 == spec.encoder_layers:
            self.stack_norm = Norm(spec, split.axis, size, users)

    def forward(self, hidden: Tensor, context: Context, source: Tensor | None = None) -> Tensor:
        """source: what the encoder has made of the source, for a layer with cross-attention."""
        mlp_norm = self.mlp_norm or self.attention_norm
        if self.spec.norm_place == "after":  # OLMo 2
            hidden = hidden + self._drop(
                self.attention_norm(self.attention(hidden, context)), context, "attention"
            )
            return hidden + self._drop(mlp_norm(self.mlp(hidden, context)), context, "mlp")
        if self.spec.norm_place == "sum":  # BERT
            hidden = self.attention_norm(
                hidden + self._drop(self.attention(hidden, context), context, "attention")
            )
            return mlp_norm(hidden + self._drop(self.mlp(hidden, context), context, "mlp"))
        normed = self.attention_norm(hidden)
        mixed = self._drop(self.attention(normed, context), context, "attention")
        if self.spec.parallel:  # GPT-J, GPT-NeoX, Phi
            normed = normed if self.spec.shared_norm else mlp_norm(hidden)
            return hidden + mixed + self._drop(self.mlp(normed, context), context, "mlp")
        hidden = hidden + mixed
        if self.cross_attention is not None and self.cross_norm is not None:
            looked = self.cross_attention(self.cross_norm(hidden), context, source)
            hidden = hidden + self._drop(looked, context, "cross_attention")
        hidden = hidden + self._drop(self.mlp(mlp_norm(hidden), context), context, "mlp")
        if self.stack_norm is None:
            return hidden
        return drop_final(self.stack_norm(hidden), self.spec, context, "encoder")

    def _drop(self, added: Tensor, context: Context, part: str) -> Tensor:
        if part == "mlp" and not self.spec.drops_mlp:
            return added
        if context.randomness is None or self.spec.hidden_dropout == 0:
            return added
        rows = context.row_numbers(self.split.rows(self.split.length(added)), added.device)
        place = f"layers.{self.layer}.{part}.output"
        return drop(added, context.randomness, place, self.spec.hidden_dropout, rows)


def drop_final(hidden: Tensor, spec: TransformerSpec, context: Context, stack: str) -> Tensor:
    """Dropout of what the norm after a stack gives."""
    rows = range(hidden.shape[1])
    return drop(hidden, context.randomness, f"final.{stack}", spec.final_dropout, rows)


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
        self.spec, self.split, self.z_loss = spec, split, z_loss
        self.norm = (
            Norm(spec, split.axis, spec.hidden_size, split.users) if spec.final_norm else None
        )
        self.transform = Transform(spec, split) if spec.head_transform else None
        if tied_to is None:
            std = spec.std_of(spec.hidden_size)
            if spec.tied:
                std = spec.embedding_init_std or spec.init_std
            tied_to = parameter((spec.vocabulary_size, spec.hidden_size), 0, split.axis, std)
        self.weight = tied_to
        self.bias = (
            parameter((spec.vocabulary_size,), 0, split.axis, None) if spec.head_bias else None
        )

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        for part in (self.norm, self.transform):
            hidden = hidden if part is None else part(hidden)
        if context is not None:
            hidden = drop_final(hidden, self.spec, context, "decoder")
        if self.spec.head_scale != 1.0:
            hidden = hidden * self.spec.head_scale
        hidden = self.split.enter(hidden)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        weight, bias = later(self.weight), None if self.bias is None else later(self.bias)
        return head_loss(
            hidden,
            weight,
            bias,
            labels,
            self.spec.vocabulary_size,
            self.split.axis,
            self.z_loss,
            None if context is None else context.counted,
        )


Recompute = bool | int | Literal["selective"]
"""What is computed again in backward instead of being kept: nothing (False, 0), groups of so many layers, of which
the input alone is kept (True is 1), or the core of attention."""


class Chunk(nn.Module):
    """A run of the model's layers, each with its tensor-axis slice. first: it has the embedding; last: the head.

    Input: token ids [B, S] if it is the first, else hidden [B, S or S / t, D]. Output: hidden; of the last one with
    labels [B, S] the sum of the losses (fp32 scalar), without them logits [B, S, V / t], with a cache those of the last
    position alone, [B, 1, V / t]; of a classifier see classifier.py; of an encoder-decoder S is the target's tokens
    there. tied_to: the embedding of another chunk of this rank, for a tied head; tables: another chunk's of this rank.
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
        tables: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.split, self.layers = spec, split, layers
        self.recompute_every = 0 if recompute == "selective" else int(recompute)
        self.embedding = Embedding(spec, split) if first else None
        if self.embedding is not None:
            name_parameters(self.embedding, "embedding")
        self.blocks = nn.ModuleDict()
        for layer in layers:
            block = Block(spec, layer, split, recompute == "selective", grid)
            name_parameters(block, f"layers.{layer}")
            if block.stack_norm is not None:
                name_parameters(block.stack_norm, "encoder_norm")
            self.blocks[str(layer)] = block
        # Chunks of one rank share the tables; of the ranks' copies that of the first chunk counts.
        self.tables = tables if tables is not None else _tables(spec, split.axis, counted=first)
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
        if self.spec.stacks is not None:
            hidden = self._both_stacks(hidden, context)
            labels = None if labels is None else labels[:, context.source :]
        else:
            hidden = self._through(_in_turn, hidden, context)
        if self.head is None:
            return hidden
        if isinstance(self.head, Classifier):
            return self.head(hidden, labels, context)
        if context.cache is not None:  # generation: nothing else is read
            hidden = hidden[:, -1:]
        return self.head(hidden, labels, context)

    def _through(self, run: Callable[..., Any], *values: Any) -> Any:
        """What `run` of all blocks gives for the values, of which the last is the context; group by group where groups
        are recomputed."""
        blocks, every = list(self.blocks.values()), self.recompute_every
        if not every or not torch.is_grad_enabled():
            return run(blocks, *values)
        *hidden, context = values
        for first in range(0, len(blocks), every):
            group = blocks[first : first + every]
            result = torch.utils.checkpoint.checkpoint(
                run, group, *hidden, context, use_reentrant=False
            )
            hidden = list(result) if isinstance(result, tuple) else [result]
        return tuple(hidden) if len(hidden) > 1 else hidden[0]

    def _both_stacks(self, hidden: Tensor, context: Context) -> Tensor:
        """Rows of source and target [B, S, D] -> the same, before the head the target's alone."""
        self._add_biases(hidden, context)
        tables: Any = self.tables.values()
        unread = [table for table in tables if bias_key(table.causal) not in context.shared]
        hidden = taking_part(hidden, unread)
        source, target = hidden.split([context.source, hidden.shape[1] - context.source], dim=1)
        if not self.encoders:  # all cross-attention reads it, and would copy it each time
            source = source.contiguous()
        source, target = self._through(_two_in_turn, source, target, context)
        return target if self.head is not None else torch.cat([source, target], dim=1)

    @property
    def encoders(self) -> range:
        """The chunk's layers that are an encoder's."""
        return range(self.layers.start, min(self.layers.stop, self.spec.encoder_layers))

    def _add_biases(self, hidden: Tensor, context: Context) -> None:
        """What the layers of the chunk add to scores. Made here, not by the first of them: that one may be made again
        in backward, which would find it made."""
        source, device = context.source, hidden.device
        targets = hidden.shape[1] - source
        visible = source_visible(context)
        if self.encoders and source:
            table = self.tables["encoder"]
            context.shared[ENCODER] = (table(source, source, visible, device),)
        if len(self.encoders) < len(self.layers):
            seen = 0 if context.cache is None else context.cache.length
            table = self.tables["decoder"]
            context.shared[DECODER] = (table(targets, seen + targets, None, device),)
            context.shared[CROSS] = (cross_bias(visible, hidden.dtype),)


def _tables(spec: TransformerSpec, axis: Axis, counted: bool) -> nn.ModuleDict:
    """The tables of relative positions, which every stage of a pipeline holds; counted: whether this stage's are those
    that count."""
    made = nn.ModuleDict()
    for name in () if spec.stacks is None else ("encoder", "decoder"):
        table: Any = RelativeBias(spec, axis, causal=name == "decoder")
        made[name] = table
        name_parameters(table, f"{name}_bias")
        placement = table.weight.placement
        placement.counted = placement.counted and counted
    return made


class Stage(nn.Module):
    """What one rank holds of the model: one or several chunks of its layers (chunks.py).

    cut: which layers are a chunk, and where each is; None: all layers on this rank, which is the whole pipe axis.
    sequence: sequence parallelism over the tensor axis, whose size must divide S. Dropout acts in training, where
    the context carries its randomness. z_loss as in parallel/loss.py. overlaps: as of Split.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        grid: Grid,
        cut: Cut | None = None,
        recompute: Recompute = False,
        sequence: bool = False,
        z_loss: float = 0.0,
        overlaps: bool = True,
    ) -> None:
        super().__init__()
        self.spec, self.grid = spec, grid
        self.split = Split(grid.tensor, sequence, overlaps)
        assert cut is not None or grid.pipe.size == 1, "several stages need a cut"
        self.cut = cut or Cut((0,), (range(spec.num_layers),))
        self.chunks = nn.ModuleDict()
        for number in self.cut.chunks_of(grid.pipe.rank):
            first = number == 0
            last = number == self.cut.last_chunk
            layers = self.cut.layers[number]
            tied_to = None if self.embedding is None else self.embedding.tokens.weight
            others: Any = next(iter(self.chunks.values()), None)
            tables = None if others is None else others.tables
            self.chunks[str(number)] = Chunk(
                spec, layers, first, last, self.split, recompute, z_loss, tied_to, grid, tables
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
        if self.head is None:
            return []
        return [value for value in (self.head.weight, self.head.bias) if value is not None]

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

    @property
    def ties(self) -> list[tuple[nn.Parameter, Axis]]:
        """What several stages hold copies of, whose gradients are summed over an axis: of a tied embedding the ends, of
        tables of relative positions all stages."""
        chunk: Any = next(iter(self.chunks.values()))
        tables = chunk.tables.parameters() if self.grid.pipe.size > 1 else ()
        found = [(table, self.grid.pipe) for table in tables]
        if self.tied_parameter is not None:
            found.append((self.tied_parameter, self.grid.ends))
        return found

    def initialise(self, seed: int) -> "Stage":
        """Initial weights by (seed, name)."""
        initialise(self, seed)
        return self.mark()

    def mark(self) -> "Stage":
        """Gives experts DeepSpeed's marks of what the expert axis splits."""
        for value, placement in placed(self):
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


def _two_in_turn(
    blocks: Sequence[nn.Module], source: Tensor, target: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    """Each block works on the rows of its stack. Without a source, in generation, the encoder has nothing to do."""
    for block in blocks:
        if block.cross_attention is not None:
            target = block(target, context, source)
        elif context.source:
            source = block(source, context)
    return source, target
