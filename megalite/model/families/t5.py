"""T5 (arXiv 1910.10683): an encoder-decoder with RMSNorm before each part, a relative position bias that a stack's
layers share, unscaled attention, and no biases. Version 1.1 has gated GELU and an untied head; in the original the
head is tied to the embedding, and hidden states are multiplied by d_model ** -0.5 before it.

transformers 5 sets `tie_word_embeddings` to true in every T5 config and keeps the original value in
`scale_decoder_outputs`; files of version 1.1 contain the head, which it then leaves untied. Here `amend` restores the
original value. Initial weights have the same standard deviations as in transformers, except for the head of version
1.1, which has d_model ** -0.5 as in the original code (t5x).
"""

import re
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families.common import (
    ACTIVATIONS,
    KEY,
    HFTensor,
    require,
    tensors,
    written,
)
from megalite.model.families.family import Family
from megalite.model.spec import Stacks, TransformerSpec

LEAST_BUCKETS = 4


def _layers(stack: str, mlp: int) -> dict[str, str]:
    """The modules of a layer. mlp: the number of the MLP in a block."""
    block = f"{stack}.block.{{layer}}.layer"
    ours, theirs = "layers.{layer}.attention", f"{block}.0.SelfAttention"
    parts = {"query": "q", "key": "k", "value": "v", "output": "o"}
    cross = {}
    if stack == "decoder":
        cross = {
            f"layers.{{layer}}.cross_attention.{name}": f"{block}.1.EncDecAttention.{letter}"
            for name, letter in parts.items()
        }
        cross["layers.{layer}.cross_norm"] = f"{block}.1.layer_norm"
    return {
        "layers.{layer}.attention_norm": f"{block}.0.layer_norm",
        **{f"{ours}.{name}": f"{theirs}.{letter}" for name, letter in parts.items()},
        **cross,
        "layers.{layer}.mlp_norm": f"{block}.{mlp}.layer_norm",
        "layers.{layer}.mlp.gate": f"{block}.{mlp}.DenseReluDense.wi_0",
        "layers.{layer}.mlp.up": f"{block}.{mlp}.DenseReluDense.wi_1",
        "layers.{layer}.mlp.down": f"{block}.{mlp}.DenseReluDense.wo",
    }


_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
TENSORS: dict[str, HFTensor] = tensors(
    {
        "embedding.tokens": "shared",
        "encoder_bias": f"encoder.{_BIAS}",
        "encoder_norm": "encoder.final_layer_norm",
        "decoder_bias": f"decoder.{_BIAS}",
        "final_norm": "decoder.final_layer_norm",
        "head": "lm_head",
    }
)
_ENCODER, _DECODER = tensors(_layers("encoder", 1)), tensors(_layers("decoder", 2))
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Tensors in older files that must be equal to the embedding."""
_UNUSED = re.compile(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.")
"""A table in older files that no model reads."""


def tensors_of_layer(spec: TransformerSpec, layer: int) -> tuple[dict[str, HFTensor], int]:
    """The table of a layer's tensors, and its number in its stack."""
    first = spec.encoder_layers
    table, number = (_ENCODER, layer) if layer < first else (_DECODER, layer - first)
    if not spec.gated:
        up = "layers.{layer}.mlp.up.weight"
        table = table | {up: HFTensor(table[up].name.replace("wi_1", "wi"))}
    return table, number


def amend(config: Any) -> None:
    """Makes `tie_word_embeddings` say again whether the head is tied to the embedding."""
    config.tie_word_embeddings = config.scale_decoder_outputs


def read(config: Any) -> TransformerSpec:
    """A T5Config as our spec."""
    require(config, "is_decoder", False)
    for field in ("is_gated_act", "scale_decoder_outputs"):
        require(config, field, True, False)
    if config.dense_act_fn not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        rule = f'must be one of {names}, or "gated-" and one of them'
        raise ConfigError(f"{KEY}.feed_forward_proj: {written(config.feed_forward_proj)}: {rule}")
    dropout = config.dropout_rate
    return TransformerSpec(
        family="t5",
        hidden_size=config.d_model,
        num_layers=config.num_layers + config.num_decoder_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_size=config.d_kv,
        intermediate_size=config.d_ff,
        vocabulary_size=config.vocab_size,
        max_positions=None,
        norm="rms",
        norm_eps=config.layer_norm_epsilon,
        rotary=None,
        activation=ACTIVATIONS[config.dense_act_fn],  # type: ignore[arg-type]
        gated=config.is_gated_act,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        tied=config.scale_decoder_outputs,
        init_std=config.initializer_factor,
        fan_in_init=True,
        scaled_scores=False,
        head_scale=config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
        stacks=_stacks(config),
        embedding_dropout=dropout,
        attention_dropout=dropout,
        hidden_dropout=dropout,
        mlp_dropout=dropout,
        final_dropout=dropout,
    )


def _stacks(config: Any) -> Stacks:
    buckets = config.relative_attention_num_buckets
    most = config.relative_attention_max_distance
    if buckets < LEAST_BUCKETS:
        rule = f"must be at least {LEAST_BUCKETS}"
        raise ConfigError(f"{KEY}.relative_attention_num_buckets: {buckets}: {rule}")
    if most <= buckets // 2:
        rule = f"must be above half of relative_attention_num_buckets {buckets}"
        raise ConfigError(f"{KEY}.relative_attention_max_distance: {most}: {rule}")
    start = getattr(config, "decoder_start_token_id", None)
    name = "pad_token_id" if start is None else "decoder_start_token_id"
    start = config.pad_token_id if start is None else start
    if not isinstance(start, int) or not 0 <= start < config.vocab_size:
        rule = f"must be the token that targets begin with, below vocab_size {config.vocab_size}"
        raise ConfigError(f"{KEY}.{name}: {written(start)}: {rule}")
    return Stacks(config.num_layers, buckets, most, start)


FAMILY = Family(
    read,
    TENSORS,
    old_keys=frozenset({"decoder_start_token_id"}),
    allowed={"is_encoder_decoder": (True,)},
    amend=amend,
    unused=_UNUSED,
    copies=_COPIES,
    tensors_of_layer=tensors_of_layer,
)
