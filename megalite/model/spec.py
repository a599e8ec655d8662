"""What our one block can be: the whole architecture of a decoder or an encoder as plain numbers and choices.

A family (families/) reads a Hugging Face config into one of these; the layers read only this. Next: layers.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
class Mixture:
    """A mixture of experts, each a gated MLP: every token goes to the `chosen` of them that its router likes best.
    balance, balance_coefficient, z_loss: how the router is trained beside the loss (router.py)."""

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool
    """Whether the weights of the chosen are divided by their sum."""
    layers: tuple[int, ...]
    """Those that have experts in place of the MLP."""
    balance_coefficient: float
    balance: Literal["sample", "bias", "none"] = "sample"
    z_loss: float = 0.0
    shared_size: int = 0
    """Features of the shared expert, which every token goes through beside the chosen; 0: there is none."""
    shared_is_weighed: bool = True
    """Whether a sigmoid of the token weighs what the shared expert makes."""
    least_sum: float = 0.0
    """`normalised`: what the sum of the weights of the chosen is taken for where it is less."""

    @property
    def weighs_shared(self) -> bool:
        """Whether there is a shared expert that is weighed."""
        return self.shared_size > 0 and self.shared_is_weighed


@dataclass(frozen=True)
class Stacks:
    """An encoder and a decoder in one list of layers: the first `encoder_layers` see all of the source, the others the
    target before a token, and by cross-attention what the encoder has made of the source (T5, arXiv 1910.10683).

    Attention's scores get a number that depends on the distance of two tokens, by head: a table with a row for each of
    `buckets` distances, which the layers of a stack share (relative.py).
    """

    encoder_layers: int
    buckets: int
    max_distance: int
    """From which on all distances are in one bucket."""
    start_id: int
    """The token that every target begins with."""


@dataclass(frozen=True)
class ClassifierSpec:
    """What takes the place of the head in a classifier of texts. What the numbers do: classifier.py."""

    labels: tuple[str, ...]
    pooling: Literal["first", "last", "mean"]
    """The hidden state that a text is judged by: its first token's, its last token's, or the mean of all."""
    dense: bool = False
    """Whether a dense layer and tanh come before the product with the labels."""
    bias: bool = True
    dropout: float = 0.0
    """Of what the product with the labels reads."""
    dense_dropout: float = 0.0
    """Of what the dense layer reads."""


@dataclass(frozen=True)
class TransformerSpec:
    """A transformer of one stack, or of two (`stacks`). Sizes are of the whole model, not of a rank's share."""

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
    activation: Activation
    gated: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    tied: bool
    init_std: float
    depth_scaled_init: bool = False
    embedding_init_std: float | None = None
    """None: as init_std."""
    norm_place: Literal["before", "after", "sum"] = "before"
    """Whether a norm reads what goes into attention and MLP, what comes out of them, or the sum of both."""
    causal: bool = True
    """Whether a token sees only those before it and itself (a decoder), or those after it too (an encoder)."""
    position_offset: int = 0
    """Of learned positions: rows before the first one's. Above 0 as RoBERTa has it: padding tokens are not counted and
    take the row before, which is not trained."""
    token_types: int = 0
    """Rows of the embedding of token types, of which every token has the first; 0: there is none."""
    embedding_norm: bool = False
    final_norm: bool = True
    norm_bias: bool = True
    """Of LayerNorm; RMSNorm has none."""
    first_norm: bool = True
    """Whether the first layer has a norm before attention, as the others have."""
    local_rotary: Rotary | None = None
    """Of layers with a window, where it is not the others'."""
    nope_layers: tuple[int, ...] = ()
    """Those without rotary positions, where the others have them (NoPE, arXiv 2305.19466)."""
    head_transform: Activation | None = None
    """The activation of a dense layer before the head, which a norm follows; None: there is neither."""
    head_transform_bias: bool = True
    parallel: bool = False
    """Whether attention and MLP read the same hidden states and are added together."""
    shared_norm: bool = False
    """With `parallel`: one norm for both."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """A norm of queries and of keys: each head by itself, or all heads together."""
    head_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """For each layer how many positions a token sees, itself included, in an encoder to each side; None or an empty
    tuple: all."""
    classifier: ClassifierSpec | None = None
    """Of a model that predicts the label of a text; None: it predicts tokens."""
    padding_id: int | None = None
    """A token whose look-up trains no embedding."""
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    """Of what attention and MLP add to the hidden states."""
    drops_mlp: bool = True
    """False: of what attention adds alone."""
    mlp_dropout: float = 0.0
    """Of the features between an MLP's matrices."""
    final_dropout: float = 0.0
    """Of what the norm after a stack gives."""
    mixture: Mixture | None = None
    """None: no layer has experts."""
    stacks: Stacks | None = None
    """None: all layers are one stack."""
    scaled_scores: bool = True
    """Whether attention's scores are divided by the root of the head's size."""
    fan_in_init: bool = False
    """Whether a matrix starts from init_std divided by the root of its inputs."""
    head_scale: float = 1.0
    """What the head multiplies hidden states with."""

    @property
    def dropout(self) -> float:
        """The largest of the dropout rates."""
        rates = [self.embedding_dropout, self.attention_dropout, self.hidden_dropout]
        rates += [self.mlp_dropout, self.final_dropout]
        if self.classifier is not None:
            rates += [self.classifier.dropout, self.classifier.dense_dropout]
        return max(rates)

    @property
    def labels(self) -> tuple[str, ...]:
        """What a classifier names; empty for a language model."""
        return () if self.classifier is None else self.classifier.labels

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder before a decoder's; 0 where there is one stack."""
        return 0 if self.stacks is None else self.stacks.encoder_layers

    def is_cross(self, layer: int) -> bool:
        """Whether a layer looks at what an encoder has made of the source."""
        return self.stacks is not None and layer >= self.encoder_layers

    def is_causal(self, layer: int) -> bool:
        """Whether a token of the layer sees only those before it and itself."""
        return self.causal and layer >= self.encoder_layers

    def share_of(self, layer: int, source: float) -> float:
        """Share of a sample's tokens that a layer works on; source: share that is an encoder's source."""
        if self.stacks is None:
            return 1.0
        return source if layer < self.encoder_layers else 1 - source

    @property
    def start_id(self) -> int | None:
        """The token that a target begins with; None where there is one stack."""
        return None if self.stacks is None else self.stacks.start_id

    def std_of(self, inputs: int) -> float:
        """Standard deviation that a matrix with so many inputs starts from."""
        return self.init_std / math.sqrt(inputs) if self.fan_in_init else self.init_std

    def scaled_by_depth(self, std: float) -> float:
        """Of a matrix that writes to the residual stream: with `depth_scaled_init` std / sqrt(2·layers), GPT-2 (Radford
        et al. 2019, section 2.3)."""
        return std / math.sqrt(2 * self.num_layers) if self.depth_scaled_init else std

    def window(self, layer: int) -> int | None:
        """Positions that a token of the layer sees, None for all."""
        return self.windows[layer] if self.windows else None

    def rotary_of(self, layer: int) -> Rotary | None:
        """Rotary positions of a layer; None where it has none."""
        if layer in self.nope_layers:
            return None
        return self.rotary if self.window(layer) is None else self.local_rotary or self.rotary

    @property
    def position_rows(self) -> int:
        """Rows of the embedding of learned positions, 0 where there is none."""
        return (self.max_positions or 0) + self.position_offset if self.rotary is None else 0

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all layers."""
        if self.mixture is None:
            return 0
        matrices = 3 * self.hidden_size * self.mixture.intermediate_size
        return len(self.mixture.layers) * self.mixture.count * matrices

    @property
    def norm_parameters(self) -> int:
        """Parameters of a norm of hidden states."""
        return self.hidden_size * self._per_feature

    @property
    def _per_feature(self) -> int:
        """Parameters of a norm for each of its features."""
        return 2 if self.norm == "layer" and self.norm_bias else 1

    @property
    def experts(self) -> int:
        """Experts of a layer that has any; 0 where none has."""
        return 0 if self.mixture is None else self.mixture.count

    @property
    def expert_size(self) -> int:
        """Features between an expert's matrices; 0 where there are none."""
        return 0 if self.mixture is None else self.mixture.intermediate_size

    @property
    def shared_size(self) -> int:
        """Features of the shared expert of a layer that has one; 0 where none has."""
        return 0 if self.mixture is None else self.mixture.shared_size

    def mixture_of(self, layer: int) -> Mixture | None:
        """The experts of a layer; None where it has an MLP."""
        return self.mixture if self.mixture is not None and layer in self.mixture.layers else None

    def layer_parameters(self, layer: int, used: bool = False) -> int:
        """Parameters of a layer, which has all norms. used: those that a token meets, of a few experts."""
        d, f = self.hidden_size, self.intermediate_size
        mlp = d * f * (3 if self.gated else 2) + self.mlp_bias * (f * (2 if self.gated else 1) + d)
        mixture = self.mixture_of(layer)
        if mixture is not None:
            experts = mixture.chosen if used else mixture.count
            shared = 3 * d * mixture.shared_size + d * mixture.weighs_shared
            mlp = d * mixture.count + experts * 3 * d * mixture.intermediate_size + shared
        cross = self.cross_parameters + self.norm_parameters if self.is_cross(layer) else 0
        return self._attention_and_norm_parameters + cross + mlp

    @property
    def cross_parameters(self) -> int:
        """Weights of a layer's cross-attention."""
        return self.hidden_size * self.head_size * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def _attention_and_norm_parameters(self) -> int:
        d, n, k, h = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_size
        attention = (
            d * h * (2 * n + 2 * k)
            + self.attention_bias * h * (n + 2 * k)
            + self.attention_output_bias * d
        )
        norms = (
            d * (1 if self.shared_norm else 2)
            + {"none": 0, "head": 2 * h, "projection": h * (n + k)}[self.qk_norm]
        )
        return attention + norms * self._per_feature

    @property
    def head_weights(self) -> int:
        """Weights of the products that are made for the positions that count: with the output embedding, or in a
        classifier."""
        d = self.hidden_size
        if self.classifier is None:
            return self.vocabulary_size * d
        return len(self.classifier.labels) * d + d * d * self.classifier.dense

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return self._parameters(used=False)

    @property
    def used_parameters(self) -> int:
        """Parameters of the whole model that a token meets."""
        return self._parameters(used=True)

    def _parameters(self, used: bool) -> int:
        d = self.hidden_size
        embeddings = (self.vocabulary_size + self.position_rows + self.token_types) * d
        if self.classifier is not None:
            head = self.head_weights + d * self.classifier.dense
            head += len(self.classifier.labels) * self.classifier.bias
        else:
            head = 0 if self.tied else self.head_weights
            head += self.vocabulary_size * self.head_bias
        transform = d * d + d * self.head_transform_bias if self.head_transform else 0
        norms = (
            self.embedding_norm
            + self.final_norm
            + (self.head_transform is not None)
            - (not self.first_norm)
            + (self.stacks is not None)
        )
        tables = 0 if self.stacks is None else 2 * self.stacks.buckets * self.num_heads
        return (
            sum(self.layer_parameters(layer, used) for layer in range(self.num_layers))
            + embeddings
            + head
            + transform
            + tables
            + norms * self.norm_parameters
        )

    def flops_per_token(
        self, sequence_length: int, counted: float = 1.0, source_length: int = 0
    ) -> float:
        """Forward and backward, matrix products only: 6 a weight that multiplies, and attention's two products over
        the positions that a token sees on average, times 3 (arXiv 2104.04473, appendix, which counts all S; causal
        attention needs S / 2 of them, and a window of w needs w - w² / 2S). counted: share
        of the tokens that the head's product is made for. source_length: tokens of an encoder-decoder's source."""
        if self.stacks is not None:
            return self._flops_of_stacks(sequence_length, counted, source_length)
        lookups = (0 if self.tied else self.vocabulary_size) + self.position_rows + self.token_types
        seen = sum(self._seen(layer, sequence_length) for layer in range(self.num_layers))
        left_out = lookups * self.hidden_size + (1 - counted) * self.head_weights
        return 6.0 * (self.used_parameters - left_out) + 12 * self.num_heads * self.head_size * seen

    def _flops_of_stacks(self, length: int, counted: float, source_length: int) -> float:
        """The same where a layer works on the source or on the target alone."""
        total = 6.0 * (counted * self.head_weights + self.norm_parameters)
        for layer in range(self.num_layers):
            weights, seen = self.layer_work(layer, length, source_length)
            total += 6.0 * weights + 12 * self.num_heads * self.head_size * seen
        return total

    def layer_work(self, layer: int, length: float, source_length: float) -> tuple[float, float]:
        """Of an encoder-decoder's layer, for a token of a sample on average: weights that multiply it, and positions
        that attention works on for it."""
        source = source_length / length
        share, target = self.share_of(layer, source), length - source_length
        if not self.is_cross(layer):
            return share * self.layer_parameters(layer), share * source_length
        keys = 2 * self.hidden_size * self.num_kv_heads * self.head_size  # of the source's tokens
        weights = share * (self.layer_parameters(layer) - keys) + source * keys
        return weights, share * (target / 2 + source_length)

    def _seen(self, layer: int, length: int) -> float:
        """Positions that a token of the layer sees on average."""
        if not self.causal:
            return length
        window = min(self.window(layer) or length, length)
        return window - window**2 / (2 * length)
