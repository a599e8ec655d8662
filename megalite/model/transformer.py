"""The model as a list of layers, and the stage of a rank: its part of that list.

    embedding, layer 0 … layer L-1, head

One hidden tensor [B, S, D] goes from each to the next, within a stage and across stages; with sequence parallelism
a rank of the tensor axis has [B, S / t, D] of it. Pipe 1 is the case of one stage; there is no second way to build
or run the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from megalite.model.attention import Attention
from megalite.model.context import Context
from megalite.model.dropout import drop
from megalite.model.layers import MLP, Norm
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split, enter
from megalite.parallel.grid import Grid
from megalite.parallel.layers import VocabularyEmbedding, initialise, name_parameters, parameter, placed
from megalite.parallel.loss import head_loss

TIED_NAME = "embedding.tokens.weight"


class Embedding(nn.Module):
    """Token ids [B, S] -> hidden [B, S or S / t, D], learned positions added where the model has them."""

    def __init__(self, spec: TransformerSpec, split: Split) -> None:
        super().__init__()
        self.split, self.dropout = split, spec.embedding_dropout
        std = spec.embedding_init_std or spec.init_std
        self.tokens = VocabularyEmbedding(spec.vocabulary_size, spec.hidden_size, split, std, spec.padding_id)
        self.positions: nn.Parameter | None = None
        if spec.rotary is None:
            shape = (spec.max_positions or 0, spec.hidden_size)
            self.positions = parameter(shape, None, split.axis, std)

    def forward(self, ids: Tensor, context: Context) -> Tensor:
        hidden, rows = self.tokens(ids), self.split.rows(ids.shape[1])
        if self.positions is not None:
            places = context.places(ids.shape[1], ids.device)[:, rows.start : rows.stop]
            hidden = hidden + enter(self.positions, self.split.users)[places]
        return drop(hidden, context.randomness, "embedding", self.dropout, rows.start)


class Block(nn.Module):
    """Attention and MLP, each added to the hidden states, with norms where the family has them.
    [B, S or S / t, D] -> the same."""

    def __init__(self, spec: TransformerSpec, layer: int, split: Split, recompute_attention: bool) -> None:
        super().__init__()
        self.spec, self.layer, self.split = spec, layer, split
        size, users = spec.hidden_size, split.users
        self.attention_norm = Norm(spec, split.axis, size, users)
        self.attention = Attention(spec, layer, split, recompute_attention)
        self.mlp_norm = None if spec.shared_norm else Norm(spec, split.axis, size, users)
        self.mlp = MLP(spec, split)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        mlp_norm = self.mlp_norm or self.attention_norm
        if self.spec.norm_place == "after":  # OLMo 2
            hidden = hidden + self._drop(self.attention_norm(self.attention(hidden, context)), context, "attention")
            return hidden + self._drop(mlp_norm(self.mlp(hidden)), context, "mlp")
        normed = self.attention_norm(hidden)
        mixed = self._drop(self.attention(normed, context), context, "attention")
        if self.spec.parallel:  # GPT-J, GPT-NeoX, Phi
            normed = normed if self.spec.shared_norm else mlp_norm(hidden)
            return hidden + mixed + self._drop(self.mlp(normed), context, "mlp")
        hidden = hidden + mixed
        return hidden + self._drop(self.mlp(mlp_norm(hidden)), context, "mlp")

    def _drop(self, added: Tensor, context: Context, part: str) -> Tensor:
        first_row = self.split.rows(added.shape[1] * self.split.axis.size).start
        place = f"layers.{self.layer}.{part}.output"
        return drop(added, context.randomness, place, self.spec.hidden_dropout, first_row)


class Head(nn.Module):
    """Final norm and the product with the output embedding: hidden [B, S or S / t, D] -> logits [B, S, V / t], or
    with labels [B, S] the sum of the losses.

    `weight` is the embedding's own parameter where both stand on one rank and are tied; on another stage a copy
    under the same name, which the engine keeps equal by summing both gradients.
    """

    def __init__(self, spec: TransformerSpec, split: Split, tied_to: nn.Parameter | None, z_loss: float) -> None:
        super().__init__()
        self.split, self.vocabulary_size, self.z_loss = split, spec.vocabulary_size, z_loss
        self.norm = Norm(spec, split.axis, spec.hidden_size, split.users)
        if tied_to is None:
            std = spec.embedding_init_std if spec.tied else None
            tied_to = parameter((spec.vocabulary_size, spec.hidden_size), 0, split.axis, std or spec.init_std)
        self.weight = tied_to
        self.bias = parameter((spec.vocabulary_size,), 0, split.axis, None) if spec.head_bias else None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.split.enter(self.norm(hidden))
        if labels is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        axis = self.split.axis
        return head_loss(hidden, self.weight, self.bias, labels, self.vocabulary_size, axis, self.z_loss)


def split_layers(spec: TransformerSpec, stages: int) -> list[range]:
    """Which blocks each stage holds, so that the longest stage is as short as can be.

    Cost is in multiply-adds a token: a block's weights, and the head's V·D on the last stage (the embedding's
    look-up costs nothing). Of equally good splits the one with fewer blocks on the last stage is taken. Every
    stage gets a block; the config's rules have refused fewer layers than stages.
    """
    head = spec.vocabulary_size * spec.hidden_size / spec.block_parameters
    best: tuple[float, int] | None = None
    for last in range(1, spec.num_layers - stages + 2) if stages > 1 else [spec.num_layers]:
        longest_other = -(-(spec.num_layers - last) // (stages - 1)) if stages > 1 else 0
        candidate = (max(longest_other, last + head), last)
        best = min(best, candidate) if best else candidate
    last = best[1] if best else spec.num_layers
    counts = [(spec.num_layers - last + i) // (stages - 1) for i in range(stages - 1)] + [last]
    starts = [sum(counts[:i]) for i in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


Recompute = bool | int | Literal["selective"]
"""What is computed again in backward instead of being kept: nothing (False, 0), groups of so many layers, of which
the input alone is kept (True is 1), or the core of attention."""


class Stage(nn.Module):
    """What one rank holds of the model: a run of its layers, each with its tensor-axis slice.

    First stage: input is token ids [B, S]; others: hidden [B, S or S / t, D]. Last stage: with labels [B, S] the sum of
    the losses (fp32 scalar), without them logits [B, S, V / t], with a cache those of the last position
    alone, [B, 1, V / t]; others return hidden.

    sequence: sequence parallelism over the tensor axis, whose size must divide S. Dropout acts in training, where
    the context carries its randomness. z_loss as in parallel/loss.py.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        grid: Grid,
        recompute: Recompute = False,
        sequence: bool = False,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.grid, self.split = spec, grid, Split(grid.tensor, sequence)
        self.recompute_every = 0 if recompute == "selective" else int(recompute)
        self.embedding = Embedding(spec, self.split) if grid.pipe.is_first else None
        if self.embedding is not None:
            name_parameters(self.embedding, "embedding")
        self.blocks = nn.ModuleDict()
        for layer in split_layers(spec, grid.pipe.size)[grid.pipe.rank]:
            block = Block(spec, layer, self.split, recompute == "selective")
            name_parameters(block, f"layers.{layer}")
            self.blocks[str(layer)] = block
        self.head: Head | None = None
        if grid.pipe.is_last:
            shared = self.embedding.tokens.weight if spec.tied and self.embedding is not None else None
            self.head = Head(spec, self.split, shared, z_loss)
            name_parameters(self.head, "head")
            self.head.norm.weight.placement.name = "final_norm.weight"  # type: ignore[union-attr]
            if self.head.norm.bias is not None:
                self.head.norm.bias.placement.name = "final_norm.bias"  # type: ignore[union-attr]
            if spec.tied:
                self.head.weight.placement.name = TIED_NAME  # type: ignore[union-attr]
                # The first stage's copy is the one that counts.
                self.head.weight.placement.counted = grid.pipe.is_first  # type: ignore[union-attr]

    @property
    def tied_parameter(self) -> nn.Parameter | None:
        """The copy of the tied embedding that another stage holds too; None where there is no other."""
        if not self.spec.tied or self.grid.pipe.size == 1:
            return None
        if self.embedding is not None:
            return self.embedding.tokens.weight
        return self.head.weight if self.head is not None else None

    def initialise(self, seed: int) -> "Stage":
        """Initial weights by (seed, name), and DeepSpeed's mark of what the tensor axis splits."""
        initialise(self, seed)
        for value, placement in placed(self):
            value.model_parallel = placement.dim is not None  # type: ignore[attr-defined]
        return self

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what crosses to the next stage for ids [B, S]."""
        return batch, len(self.split.rows(length)), self.spec.hidden_size

    def forward(self, x: Tensor, labels: Tensor | None = None, context: Context | None = None) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        context = replace(context or Context(), shared={})
        if not training:
            context.randomness = None
        assert context.randomness is not None or not training or self.spec.dropout == 0, "dropout needs randomness"
        hidden = self.embedding(x, context) if self.embedding is not None else x
        blocks, every = list(self.blocks.values()), self.recompute_every
        for first in range(0, len(blocks), every or len(blocks)):
            group = blocks[first : first + every] if every else blocks
            if every and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(_in_turn, group, hidden, context, use_reentrant=False)
            else:
                hidden = _in_turn(group, hidden, context)
        if self.head is None:
            return hidden
        if context.cache is not None:  # generation: nothing else is read
            hidden = hidden[:, -1:]
        return self.head(hidden, labels)


def _in_turn(blocks: Sequence[nn.Module], hidden: Tensor, context: Context) -> Tensor:
    for block in blocks:
        hidden = block(hidden, context)
    return hidden
