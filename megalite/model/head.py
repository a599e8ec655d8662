"""The head of a language model: hidden states to logits, or with labels to the loss. Shapes as in mlp.py. A
classifier's head is in classifier.py. Next: transformer.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.block import drop_final
from megalite.model.context import Context
from megalite.model.mlp import Transform
from megalite.model.norms import Norm
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split
from megalite.parallel.deferred import later
from megalite.parallel.layers import parameter
from megalite.parallel.loss import head_loss


class Head(nn.Module):
    """Final norm, transform and the product with the output embedding: hidden [B, S or S / t, D] -> logits
    [B, S, V / t], or with labels [B, S] the sum of the losses.

    With tied embeddings `weight` is the embedding's own parameter if that is on the same rank, else a copy under the
    same name, which the engine keeps equal by summing the gradients of both.
    """

    def __init__(
        self, spec: TransformerSpec, split: Split, tied_to: nn.Parameter | None, z_loss: float
    ) -> None:
        super().__init__()
        self.spec, self.split, self.z_loss = spec, split, z_loss
        size = spec.hidden_size
        self.norm = Norm(spec, split.axis, size, split.users) if spec.final_norm else None
        self.transform = Transform(spec, split) if spec.head_transform else None
        if tied_to is None:
            std = spec.std_of(size)
            if spec.tied:
                std = spec.embedding_init_std or spec.init_std
            tied_to = parameter((spec.vocabulary_size, size), 0, split.axis, std)
        self.weight = tied_to
        self.bias = None
        if spec.head_bias:
            self.bias = parameter((spec.vocabulary_size,), 0, split.axis, None)

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.transform is not None:
            hidden = self.transform(hidden)
        if context is not None:
            hidden = drop_final(hidden, self.spec, context, "decoder")
        if self.spec.head_scale != 1.0:
            hidden = hidden * self.spec.head_scale
        hidden = self.split.enter(hidden)
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return head_loss(
            hidden,
            later(self.weight),
            None if self.bias is None else later(self.bias),
            labels,
            self.spec.vocabulary_size,
            self.split.axis,
            self.z_loss,
            None if context is None else context.counted,
        )
