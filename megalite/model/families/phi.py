"""Phi-1, 1.5 and 2 (arXiv 2306.11644, 2309.05463): attention and MLP in parallel after one norm, rotary embeddings on
part of a head, biases everywhere, including the head."""

from typing import Any

from megalite.model.families.common import (
    ACTIVATIONS,
    choose,
    equal_head_size,
    head_size,
    padding,
    rotary,
    tensors,
)
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

TENSORS = tensors(
    {
        "embedding.tokens": "model.embed_tokens",
        "layers.{layer}.attention_norm": "model.layers.{layer}.input_layernorm",
        "layers.{layer}.attention.query": "model.layers.{layer}.self_attn.q_proj",
        "layers.{layer}.attention.key": "model.layers.{layer}.self_attn.k_proj",
        "layers.{layer}.attention.value": "model.layers.{layer}.self_attn.v_proj",
        "layers.{layer}.attention.output": "model.layers.{layer}.self_attn.dense",
        "layers.{layer}.attention.query_norm": "model.layers.{layer}.self_attn.q_layernorm",
        "layers.{layer}.attention.key_norm": "model.layers.{layer}.self_attn.k_layernorm",
        "layers.{layer}.mlp.up": "model.layers.{layer}.mlp.fc1",
        "layers.{layer}.mlp.down": "model.layers.{layer}.mlp.fc2",
        "final_norm": "model.final_layernorm",
        "head": "lm_head",
    }
)


def read(config: Any) -> TransformerSpec:
    """A PhiConfig as our spec."""
    # transformers' norms of queries and keys have hidden_size / num_attention_heads features.
    size = equal_head_size(config) if config.qk_layernorm else head_size(config)
    return TransformerSpec(
        family="phi",
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=size,
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        rotary=rotary(config, size, partial=True),
        activation=choose(config, "hidden_act", ACTIVATIONS),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        parallel=True,
        shared_norm=True,
        qk_norm="head" if config.qk_layernorm else "none",
        head_bias=True,
        padding_id=padding(config),
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attention_dropout or 0.0,
        hidden_dropout=config.resid_pdrop,
    )


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM)
