"""The model as a list of layers that is cut into chunks, and a rank's stage: the chunks that it holds.

    embedding, layer 0 … layer L-1, head

One hidden tensor [B, S, D] goes from each to the next, within a chunk and across chunks; with sequence parallelism a
rank of the tensor axis has [B, S / t, D] of it. In an encoder-decoder it contains the rows of the source, then those of
the target; encoder layers work on the source, decoder layers on the target, with cross-attention to the source. Without
pipeline parallelism there is one stage with one chunk, built and run by the same code. A layer is in block.py, the ends
are in embedding.py, head.py and classifier.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalite.model.block import Block
from megalite.model.chunks import Cut
from megalite.model.classifier import Classifier
from megalite.model.context import Context
from megalite.model.embedding import Embedding
from megalite.model.experts import RoutedMLP
from megalite.model.head import Head
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
from megalite.parallel.deferred import WeightGradients, give
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import initialise, name_parameters, placed

TIED_NAME = "embedding.tokens.weight"
EXPERTS = "experts"  # name under which DeepSpeed knows the parameters that an expert axis splits

Recompute = bool | int | Literal["selective"]
"""What backward recomputes instead of keeping it: nothing (False, 0); everything in groups of this many layers but the
input of each group (True is 1); or the core of attention."""


class Chunk(nn.Module):
    """Consecutive layers of the model, each with its tensor-axis slice. first: it has the embedding; last: the head.

    Input: token ids [B, S] for the first chunk, else hidden [B, S or S / t, D]. Output: hidden; for the last chunk with
    labels [B, S] the sum of the losses (fp32 scalar), without them logits [B, S, V / t], with a cache only those of the
    last position, [B, 1, V / t]. In an encoder-decoder the S of this output is the target's. A classifier's output is
    in classifier.py. tied_to: the embedding in another chunk of this rank, for a tied head; tables: those of another
    chunk of this rank, to be shared.
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
        # Chunks of one rank share the tables; only the first chunk's copy counts in norms and checkpoints.
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
            if is_copy:  # only the embedding counts in norms and checkpoints
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
        if context.cache is not None:  # generation reads only the last position
            hidden = hidden[:, -1:]
        return self.head(hidden, labels, context)

    def _through(self, run: Callable[..., Any], *values: Any) -> Any:
        """`run(blocks, *values)`, whose last value is the context; called for each group of blocks if groups are
        recomputed."""
        blocks, every = list(self.blocks.values()), self.recompute_every
        if not every or not torch.is_grad_enabled():
            return run(blocks, *values)
        *hidden, context = values
        for first in range(0, len(blocks), every):
            group = blocks[first : first + every]
            # No layer uses torch's random generators: dropout's numbers follow from the context.
            result = torch.utils.checkpoint.checkpoint(
                run, group, *hidden, context, use_reentrant=False, preserve_rng_state=False
            )
            hidden = list(result) if isinstance(result, tuple) else [result]
        return tuple(hidden) if len(hidden) > 1 else hidden[0]

    def _both_stacks(self, hidden: Tensor, context: Context) -> Tensor:
        """Rows of source and target [B, S, D] -> the same; in the last chunk only the target's."""
        self._add_biases(hidden, context)
        tables: Any = self.tables.values()
        unread = [table for table in tables if bias_key(table.causal) not in context.shared]
        hidden = taking_part(hidden, unread)
        source, target = hidden.split([context.source, hidden.shape[1] - context.source], dim=1)
        if not self.encoders:  # each cross-attention reads it, and would otherwise copy it
            source = source.contiguous()
        source, target = self._through(_two_in_turn, source, target, context)
        return target if self.head is not None else torch.cat([source, target], dim=1)

    @property
    def encoders(self) -> range:
        """Numbers of the chunk's encoder layers."""
        return range(self.layers.start, min(self.layers.stop, self.spec.encoder_layers))

    def _add_biases(self, hidden: Tensor, context: Context) -> None:
        """Computes the biases that the chunk's layers add to attention scores. The first layer cannot do it: it may be
        recomputed in backward, and would then find them in the context."""
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
    """The tables of relative positions, of which every stage of a pipeline holds a copy; counted: whether this copy
    counts in norms and checkpoints."""
    tables = nn.ModuleDict()
    for name in () if spec.stacks is None else ("encoder", "decoder"):
        table: Any = RelativeBias(spec, axis, causal=name == "decoder")
        tables[name] = table
        name_parameters(table, f"{name}_bias")
        placement = table.weight.placement
        placement.counted = placement.counted and counted
    return tables


class Stage(nn.Module):
    """The part of the model on one rank: one or several chunks of its layers (chunks.py).

    cut: the layers of each chunk, and its rank; None: all layers, on a pipe axis of one rank. sequence: whether to use
    sequence parallelism over the tensor axis, whose size must then divide S. Dropout is applied only in training, with
    the randomness of the context. z_loss: as in parallel/loss.py. overlaps: as in Split.
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
            tables = self._chunks[0].tables if self._chunks else None
            self.chunks[str(number)] = Chunk(
                spec, layers, first, last, self.split, recompute, z_loss, tied_to, grid, tables
            )

    @property
    def _chunks(self) -> list[Chunk]:
        return list(self.chunks.values())  # type: ignore[arg-type]

    @property
    def embedding(self) -> Embedding | None:
        """None if the first chunk is on another rank."""
        return next(
            (chunk.embedding for chunk in self._chunks if chunk.embedding is not None), None
        )

    @property
    def head(self) -> Head | Classifier | None:
        """None if the last chunk is on another rank."""
        return next((chunk.head for chunk in self._chunks if chunk.head is not None), None)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the head's last product, to the vocabulary or a classifier's labels; empty if the head is on
        another rank."""
        if self.head is None:
            return []
        return [value for value in (self.head.weight, self.head.bias) if value is not None]

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Shape of the last chunk's output in an evaluation: the sum of the losses, with a classifier also counts."""
        classifier = self.spec.classifier
        return () if classifier is None else (1 + len(classifier.labels) ** 2,)

    @property
    def tied_parameter(self) -> nn.Parameter | None:
        """This rank's copy of the tied embedding, if another rank holds one too; else None."""
        if not self.spec.tied or len(self.cut.ends) == 1:
            return None
        if self.embedding is not None:
            return self.embedding.tokens.weight
        return self.head.weight if self.head is not None else None

    @property
    def ties(self) -> list[tuple[nn.Parameter, Axis]]:
        """Parameters that several stages hold copies of, with the axis over which their gradients are summed: a tied
        embedding's is the two ends, that of tables of relative positions is all stages."""
        found = []
        if self.grid.pipe.size > 1:
            found = [(table, self.grid.pipe) for table in self._chunks[0].tables.parameters()]
        if self.tied_parameter is not None:
            found.append((self.tied_parameter, self.grid.ends))
        return found

    def initialise(self, seed: int) -> "Stage":
        """Initialises the weights by (seed, name)."""
        initialise(self, seed)
        return self.mark()

    def mark(self) -> "Stage":
        """Sets DeepSpeed's attributes for parameters that the expert axis splits."""
        for value, placement in placed(self):
            if placement.has_own_replicas:
                value.allreduce = False  # type: ignore[attr-defined]
                value.group_name = EXPERTS  # type: ignore[attr-defined]
        return self

    @property
    def routers(self) -> dict[int, Router]:
        """The routers of this rank's layers, by layer number; layers without experts are left out."""
        blocks: Any = [block for chunk in self._chunks for block in chunk.blocks.values()]
        return {
            block.layer: block.mlp.router for block in blocks if isinstance(block.mlp, RoutedMLP)
        }

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of the hidden states sent to the next chunk for `batch` samples of `length` tokens."""
        rows = self.split.rows(length // self.grid.context.size)
        return batch, len(rows), self.spec.hidden_size

    def forward(
        self,
        x: Tensor | WeightGradients,
        labels: Tensor | None = None,
        context: Context | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """One chunk's forward (see Chunk). chunk: its number; None: the only one. For the WeightGradients that a
        backward to the input has left, returns a scalar whose backward adds them to the parameters."""
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
    """Each block works on the rows of its stack. Without a source, in generation, encoder layers are skipped."""
    for block in blocks:
        if block.cross_attention is not None:
            target = block(target, context, source)
        elif context.source:
            source = block(source, context)
    return source, target
