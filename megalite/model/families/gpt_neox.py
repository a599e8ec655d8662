"""GPT-NeoX (arXiv 2204.06745) and Pythia: attention and MLP in parallel, rotary embeddings on part of a head. Its
files store q, k and v fused, head by head."""

from typing import Any

from megalite.model.families.common import (
    ACTIVATIONS,
    QUERY_KEY_VALUE,
    choose,
    equal_head_size,
    fused,
    rotary,
    tensors,
)
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

TENSORS = tensors(
    {
        "embedding.tokens": "gpt_neox.embed_in",
        "layers.{layer}.attention_norm": "gpt_neox.layers.{layer}.input_layernorm",
        "layers.{layer}.attention.output": "gpt_neox.layers.{layer}.attention.dense",
        "layers.{layer}.mlp_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "layers.{layer}.mlp.up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
        "layers.{layer}.mlp.down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    }
) | fused(QUERY_KEY_VALUE, "gpt_neox.layers.{layer}.attention.query_key_value", by_head=True)


def read(config: Any) -> TransformerSpec:
    """A GPTNeoXConfig as our spec."""
    size = equal_head_size(config)
    return TransformerSpec(
        family="gpt_neox",
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=size,
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        rotary=rotary(config, size, partial=True),
        activation=choose(config, "hidden_act", ACTIVATIONS),
        gated=False,
        attention_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        mlp_bias=True,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        parallel=config.use_parallel_residual,
        embedding_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
    )


FAMILY = Family(read, TENSORS)
