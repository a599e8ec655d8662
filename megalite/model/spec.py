"""What our one block can be: the whole architecture of a decoder as plain numbers and choices.

A family (families/) reads a Hugging Face config into one of these; the layers read only this. Next: layers.py.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: which features of a head turn, and how fast. What the numbers do: rotary.py."""

    theta: float
    size: int
    """Features of a head that turn, the first ones; the rest are left as they are."""
    interleaved: bool = False
    """Whether neighbours make a pair (GPT-J), or the two halves of the turning features do (the others)."""
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    max_positions: int = 0
    """`dynamic`: the length from which on the base grows."""
    original_positions: int = 0
    """`llama3`, `yarn`: the length that the model was first trained at."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What sines and cosines are multiplied with."""


@dataclass(frozen=True)
class TransformerSpec:
    """A decoder-only transformer. Sizes are of the whole model, not of a rank's share."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocabulary_size: int
    max_positions: int | None
    """Positions that the model can have: a limit only where they are learned or the config states one."""
    norm: Literal["rms", "layer"]
    norm_eps: float
    rotary: Rotary | None
    """None: positions are learned and added to the embedding."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    tied: bool
    init_std: float
    depth_scaled_init: bool = False
    embedding_init_std: float | None = None
    """None: as init_std."""
    norm_place: Literal["before", "after"] = "before"
    """Whether a norm reads what goes into attention and MLP, or what comes out of them."""
    parallel: bool = False
    """Whether attention and MLP read the same hidden states and are added together."""
    shared_norm: bool = False
    """With `parallel`: one norm for both."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """A norm of queries and of keys: each head by itself, or all heads together."""
    head_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """For each layer how many positions a token sees, itself included; None or an empty tuple: all before it."""
    padding_id: int | None = None
    """A token whose look-up trains no embedding."""
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    """Of what attention and MLP add to the hidden states."""

    @property
    def dropout(self) -> float:
        """The largest of the dropout rates."""
        return max(self.embedding_dropout, self.attention_dropout, self.hidden_dropout)

    def window(self, layer: int) -> int | None:
        """Positions that a token of the layer sees, None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def block_parameters(self) -> int:
        """Parameters of one layer."""
        d, n, k, h, f = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_size, self.intermediate_size
        attention = d * h * (2 * n + 2 * k) + self.attention_bias * h * (n + 2 * k) + self.attention_output_bias * d
        mlp = d * f * (3 if self.gated else 2) + self.mlp_bias * (f * (2 if self.gated else 1) + d)
        norms = d * (1 if self.shared_norm else 2) + {"none": 0, "head": 2 * h, "projection": h * (n + k)}[self.qk_norm]
        return attention + mlp + norms * (2 if self.norm == "layer" else 1)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        d = self.hidden_size
        norm = d * (2 if self.norm == "layer" else 1)
        embeddings = self.vocabulary_size * (d * (1 if self.tied else 2) + self.head_bias)
        learned = (self.max_positions or 0) * d if self.rotary is None else 0
        return self.num_layers * self.block_parameters + norm + embeddings + learned

    def flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward, matrix products only: 6 a weight that multiplies, and attention's two products over
        the positions that a token sees on average, times 3 (arXiv 2104.04473, appendix, which counts all S; causal
        attention needs S / 2 of them, and a window of w needs w - w² / 2S)."""
        lookups = 0 if self.tied else self.vocabulary_size * self.hidden_size
        if self.rotary is None:
            lookups += (self.max_positions or 0) * self.hidden_size
        windows = [min(self.window(layer) or sequence_length, sequence_length) for layer in range(self.num_layers)]
        seen = sum(window - window**2 / (2 * sequence_length) for window in windows)
        return 6.0 * (self.num_parameters - lookups) + 12 * self.num_heads * self.head_size * seen
