"""Two stages of transformers' Llama for the peers with pipelines: the embedding and the layers before `cut`, and the
rest with the head."""

from typing import Any

import torch
from torch import Tensor, nn


class PeerStage(nn.Module):
    """Token ids or hidden states -> hidden states or logits."""

    def __init__(self, model: Any, first: bool, cut: int) -> None:
        super().__init__()
        inner = model.model
        self.embedding = inner.embed_tokens if first else None
        self.layers = inner.layers[:cut] if first else inner.layers[cut:]
        self.rotary = inner.rotary_emb
        self.norm, self.head = (None, None) if first else (inner.norm, model.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        angles = self.rotary(hidden, positions)
        for layer in self.layers:
            out = layer(
                hidden, attention_mask=None, position_ids=positions, position_embeddings=angles
            )
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden if self.norm is None or self.head is None else self.head(self.norm(hidden))
