"""The whole architecture of a model as plain numbers and choices: everything that our block can be.

A family (families/) converts a Hugging Face config into a TransformerSpec; the layers read only the spec. Next:
mlp.py.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings: the features of a head that are rotated, and how fast. rotary.py has the formulas."""

    theta: float
    size: int
    """Number of leading features of a head that are rotated; the rest are unchanged."""
    interleaved: bool = False
    """Whether pairs are neighbouring features (GPT-J), or one from each half of the rotated features (others)."""
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    max_positions: int = 0
    """`dynamic`: the length above which the base grows."""
    original_positions: int = 0
    """`llama3`, `yarn`: the length that the model was originally trained at."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Factor of sines and cosines."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts, each a gated MLP: every token goes to the `chosen` experts with the highest router scores.
    balance, balance_coefficient, z_loss: auxiliary training of the router (router.py)."""

    count: int
    chosen: int
    intermediate_size: int
    normalised: bool
    """Whether the weights of the chosen experts are divided by their sum."""
    layers: tuple[int, ...]
    """The layers that have experts in place of the MLP."""
    balance_coefficient: float
    balance: Literal["sample", "bias", "none"] = "sample"
    z_loss: float = 0.0
    shared_size: int = 0
    """Features of the shared expert, which every token goes through in addition to the chosen ones; 0: none."""
    shared_is_weighed: bool = True
    """Whether the shared expert's output is multiplied by a sigmoid of the token."""
    least_sum: float = 0.0
    """`normalised`: lower bound of the sum that the weights are divided by."""

    @property
    def weighs_shared(self) -> bool:
        """Whether there is a shared expert whose output is weighted."""
        return self.shared_size > 0 and self.shared_is_weighed


@dataclass(frozen=True)
class Stacks:
    """An encoder and a decoder in one list of layers: the first `encoder_layers` attend to the whole source, the others
    causally to the target and, by cross-attention, to the encoder's output (T5, arXiv 1910.10683).

    A relative position bias is added to the attention scores: a table with a row for each of `buckets` distances and a
    column for each head, which the layers of a stack share (relative.py).
    """

    encoder_layers: int
    buckets: int
    max_distance: int
    """Larger distances share one bucket."""
    start_id: int
    """The token that every target begins with."""


@dataclass(frozen=True)
class ClassifierSpec:
    """The head of a text classifier, in place of the language model's; see classifier.py."""

    labels: tuple[str, ...]
    pooling: Literal["first", "last", "mean"]
    """The hidden state that is classified: the first token's, the last token's, or the mean of all."""
    dense: bool = False
    """Whether a dense layer and tanh come before the output layer."""
    bias: bool = True
    dropout: float = 0.0
    """Dropout of the output layer's input."""
    dense_dropout: float = 0.0
    """Dropout of the dense layer's input."""


class LayerKind(NamedTuple):
    """Layers of one kind have weights of the same shapes, and take the same time and memory."""

    window: int | None
    rotary: Rotary | None
    has_experts: bool
    has_attention_norm: bool


@dataclass(frozen=True)
class TransformerSpec:
    """A transformer with one stack, or two (`stacks`). Sizes are those of the whole model, not of one rank."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocabulary_size: int
    max_positions: int | None
    """Most positions of a sequence; None if positions are not learned and the config states no limit."""
    norm: Literal["rms", "layer"]
    norm_eps: float
    rotary: Rotary | None
    """None: learned positions are added to the embedding."""
    activation: Activation
    gated: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    tied: bool
    init_std: float
    depth_scaled_init: bool = False
    embedding_init_std: float | None = None
    """None: the same as init_std."""
    norm_place: Literal["before", "after", "sum"] = "before"
    """Whether norms apply to the inputs of attention and MLP, to their outputs, or to the residual sums."""
    causal: bool = True
    """Whether a token attends only to itself and earlier tokens (a decoder), or to all tokens (an encoder)."""
    position_offset: int = 0
    """Rows of the learned position table before that of position 0. Above 0 as in RoBERTa: padding tokens are not
    counted, and use the row before, which is not trained."""
    token_types: int = 0
    """Rows of the token type embedding; every token has type 0; 0: there is no such embedding."""
    embedding_norm: bool = False
    final_norm: bool = True
    norm_bias: bool = True
    """Whether LayerNorm has a bias; RMSNorm has none."""
    first_norm: bool = True
    """Whether the first layer has a norm before attention like the other layers."""
    local_rotary: Rotary | None = None
    """Rotary embeddings of layers with a window; None: the same as in the other layers."""
    nope_layers: tuple[int, ...] = ()
    """Layers without rotary embeddings in a model that has them (NoPE, arXiv 2305.19466)."""
    head_transform: Activation | None = None
    """The activation of a dense layer, followed by a norm, before the head; None: there is no such layer."""
    head_transform_bias: bool = True
    parallel: bool = False
    """Whether attention and MLP read the same hidden states and are added together."""
    shared_norm: bool = False
    """With `parallel`: one norm for both."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Norm of queries and keys: over each head, or over all heads together."""
    head_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """The attention window of each layer, in positions including the token itself, in an encoder to each side; None or
    an empty tuple: no window."""
    classifier: ClassifierSpec | None = None
    """The head of a text classifier; None: the model predicts tokens."""
    padding_id: int | None = None
    """A token whose embedding gets no gradient."""
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    """Dropout of what attention and MLP add to the hidden states."""
    drops_mlp: bool = True
    """False: hidden_dropout applies to attention only."""
    mlp_dropout: float = 0.0
    """Dropout of the features between an MLP's matrices."""
    final_dropout: float = 0.0
    """Dropout of the output of the norm after a stack."""
    mixture: Mixture | None = None
    """None: no layer has experts."""
    stacks: Stacks | None = None
    """None: all layers are one stack."""
    scaled_scores: bool = True
    """Whether attention scores are divided by the square root of the head size."""
    fan_in_init: bool = False
    """Whether a matrix's initial std is init_std divided by the square root of its input features."""
    head_scale: float = 1.0
    """Factor of the hidden states before the head."""

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
        """The labels of a classifier; empty for a language model."""
        return () if self.classifier is None else self.classifier.labels

    @property
    def encoder_layers(self) -> int:
        """Number of encoder layers, which come before the decoder's; 0 if there is one stack."""
        return 0 if self.stacks is None else self.stacks.encoder_layers

    def is_cross(self, layer: int) -> bool:
        """Whether a layer has cross-attention to the encoder's output."""
        return self.stacks is not None and layer >= self.encoder_layers

    def is_causal(self, layer: int) -> bool:
        """Whether a token of the layer attends only to itself and earlier tokens."""
        return self.causal and layer >= self.encoder_layers

    def share_of(self, layer: int, source: float) -> float:
        """Share of a sample's tokens that a layer processes. source: share that is the encoder's source."""
        if self.stacks is None:
            return 1.0
        return source if layer < self.encoder_layers else 1 - source

    @property
    def start_id(self) -> int | None:
        """The token that a target begins with; None if there is one stack."""
        return None if self.stacks is None else self.stacks.start_id

    def std_of(self, inputs: int) -> float:
        """Initial standard deviation of a matrix with `inputs` input features."""
        return self.init_std / math.sqrt(inputs) if self.fan_in_init else self.init_std

    def scaled_by_depth(self, std: float) -> float:
        """The initial std of a matrix that writes to the residual stream: with `depth_scaled_init`
        std / sqrt(2·layers), as in GPT-2 (Radford et al. 2019, section 2.3)."""
        return std / math.sqrt(2 * self.num_layers) if self.depth_scaled_init else std

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in positions; None: no window."""
        return self.windows[layer] if self.windows else None

    def rotary_of(self, layer: int) -> Rotary | None:
        """The rotary embeddings of a layer; None if it has none."""
        if layer in self.nope_layers:
            return None
        return self.rotary if self.window(layer) is None else self.local_rotary or self.rotary

    def kind(self, layer: int) -> "LayerKind":
        """What distinguishes a layer from the others."""
        has_norm = bool(layer) or self.first_norm
        return LayerKind(
            self.window(layer), self.rotary_of(layer), self.mixture_of(layer) is not None, has_norm
        )

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table; 0 if there is none."""
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
        """Number of experts in a layer that has experts; 0 if none has."""
        return 0 if self.mixture is None else self.mixture.count

    @property
    def expert_size(self) -> int:
        """Features between an expert's matrices; 0 if there are no experts."""
        return 0 if self.mixture is None else self.mixture.intermediate_size

    @property
    def shared_size(self) -> int:
        """Features of a layer's shared expert; 0 if there is none."""
        return 0 if self.mixture is None else self.mixture.shared_size

    def mixture_of(self, layer: int) -> Mixture | None:
        """The experts of a layer; None if it has an MLP."""
        return self.mixture if self.mixture is not None and layer in self.mixture.layers else None

    def layer_parameters(self, layer: int, used: bool = False) -> int:
        """Parameters of a layer that has all norms. used: only those that one token uses, those of its few experts."""
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
        """Weights of the head, which is computed only for positions that count: the output embedding, or a
        classifier's matrices."""
        d = self.hidden_size
        if self.classifier is None:
            return self.vocabulary_size * d
        return len(self.classifier.labels) * d + d * d * self.classifier.dense

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; tied ones count once."""
        return self._parameters(used=False)

    @property
    def used_parameters(self) -> int:
        """Parameters of the whole model that one token uses."""
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
        """FLOPs per token of forward and backward, matrix products only: 6 per weight, and 3 times attention's two
        products over the positions that a token attends to on average (arXiv 2104.04473, appendix, which counts all S;
        causal attention needs S / 2 of them, and a window of w needs w - w² / 2S). counted: share of the tokens that
        the head is computed for. source_length: tokens of an encoder-decoder's source."""
        if self.stacks is not None:
            return self._flops_of_stacks(sequence_length, counted, source_length)
        lookups = (0 if self.tied else self.vocabulary_size) + self.position_rows + self.token_types
        seen = sum(self._seen(layer, sequence_length) for layer in range(self.num_layers))
        left_out = lookups * self.hidden_size + (1 - counted) * self.head_weights
        return 6.0 * (self.used_parameters - left_out) + 12 * self.num_heads * self.head_size * seen

    def _flops_of_stacks(self, length: int, counted: float, source_length: int) -> float:
        """`flops_per_token` of an encoder-decoder, each of whose layers processes only the source or the target."""
        total = 6.0 * (counted * self.head_weights + self.norm_parameters)
        for layer in range(self.num_layers):
            weights, seen = self.layer_work(layer, length, source_length)
            total += 6.0 * weights + 12 * self.num_heads * self.head_size * seen
        return total

    def layer_work(self, layer: int, length: float, source_length: float) -> tuple[float, float]:
        """(weights, positions) that a layer of an encoder-decoder uses per token of a sample, on average: weights that
        multiply the token, and positions that attention computes for it."""
        source = source_length / length
        share, target = self.share_of(layer, source), length - source_length
        if not self.is_cross(layer):
            return share * self.layer_parameters(layer), share * source_length
        keys = 2 * self.hidden_size * self.num_kv_heads * self.head_size  # of the source's tokens
        weights = share * (self.layer_parameters(layer) - keys) + source * keys
        return weights, share * (target / 2 + source_length)

    def _seen(self, layer: int, length: int) -> float:
        """Positions that a token of the layer attends to on average."""
        if not self.causal:
            return length
        window = min(self.window(layer) or length, length)
        return window - window**2 / (2 * length)
