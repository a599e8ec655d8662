"""The embedding of a model: token ids to hidden states. Shapes as in mlp.py. Next: block.py."""

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.dropout import drop
from megalite.model.norms import Norm
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split, enter
from megalite.parallel.deferred import later
from megalite.parallel.layers import VocabularyEmbedding, parameter


class Embedding(nn.Module):
    """Token ids [B, S] -> hidden [B, S or S / t, D], with learned positions, a token type and a norm if the model has
    them."""

    def __init__(self, spec: TransformerSpec, split: Split) -> None:
        super().__init__()
        self.split, self.dropout = split, spec.embedding_dropout
        std = spec.embedding_init_std or spec.init_std
        self.tokens = VocabularyEmbedding(
            spec.vocabulary_size, spec.hidden_size, split, std, spec.padding_id
        )
        self.position_offset, self.positions, self.types = spec.position_offset, None, None
        d, axis = spec.hidden_size, split.axis
        if spec.position_rows:
            self.positions = parameter((spec.position_rows, d), None, axis, std)
        if spec.token_types:
            self.types = parameter((spec.token_types, d), None, axis, std)
        self.norm = Norm(spec, axis, d, split.users) if spec.embedding_norm else None

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
        """Rows of the position table for this rank's part of the tokens."""
        if not self.position_offset:
            return table[context.places(ids.shape[1], ids.device)[:, rows.start : rows.stop]]
        padding = self.position_offset - 1
        places = context.counted_places(ids != padding) + padding
        return F.embedding(places[:, rows.start : rows.stop], table, padding)
