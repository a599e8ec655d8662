"""A layer of the model: attention, and an MLP or experts, each added to the hidden states. Shapes as in mlp.py.
Next: head.py.
"""

from torch import Tensor, nn

from megalite.model.attention import Attention, CrossAttention
from megalite.model.context import Context
from megalite.model.dropout import drop
from megalite.model.experts import RoutedMLP
from megalite.model.mlp import MLP
from megalite.model.norms import Norm
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Grid


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
        has_first_norm = layer > 0 or spec.first_norm
        self.attention_norm = (
            Norm(spec, split.axis, size, users) if has_first_norm else nn.Identity()
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
        """source: the encoder's output, for a layer with cross-attention."""
        mlp_norm = self.mlp_norm or self.attention_norm
        if self.spec.norm_place == "after":  # OLMo 2
            mixed = self.attention_norm(self.attention(hidden, context))
            hidden = hidden + self._drop(mixed, context, "attention")
            fed = mlp_norm(self.mlp(hidden, context))
            return hidden + self._drop(fed, context, "mlp")
        if self.spec.norm_place == "sum":  # BERT
            mixed = self.attention(hidden, context)
            hidden = self.attention_norm(hidden + self._drop(mixed, context, "attention"))
            fed = self.mlp(hidden, context)
            return mlp_norm(hidden + self._drop(fed, context, "mlp"))
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
    """Dropout of the result of the norm after a stack."""
    rows = range(hidden.shape[1])
    return drop(hidden, context.randomness, f"final.{stack}", spec.final_dropout, rows)
