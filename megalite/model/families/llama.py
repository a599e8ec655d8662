"""Llama (arXiv 2302.13971): RMSNorm, rotary embeddings, SwiGLU, grouped-query attention. The base of other families."""

from typing import Any

from megalite.model.families.common import (
    ACTIVATIONS,
    choose,
    head_size,
    padding,
    require,
    rotary,
    tensors,
)
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

TENSORS = tensors(
    {
        "embedding.tokens": "model.embed_tokens",
        "layers.{layer}.attention_norm": "model.layers.{layer}.input_layernorm",
        "layers.{layer}.attention.query": "model.layers.{layer}.self_attn.q_proj",
        "layers.{layer}.attention.key": "model.layers.{layer}.self_attn.k_proj",
        "layers.{layer}.attention.value": "model.layers.{layer}.self_attn.v_proj",
        "layers.{layer}.attention.output": "model.layers.{layer}.self_attn.o_proj",
        "layers.{layer}.mlp_norm": "model.layers.{layer}.post_attention_layernorm",
        "layers.{layer}.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "layers.{layer}.mlp.up": "model.layers.{layer}.mlp.up_proj",
        "layers.{layer}.mlp.down": "model.layers.{layer}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    }
)
QUERY_AND_KEY_NORMS = tensors(
    {
        "layers.{layer}.attention.query_norm": "model.layers.{layer}.self_attn.q_norm",
        "layers.{layer}.attention.key_norm": "model.layers.{layer}.self_attn.k_norm",
    }
)
WITHOUT_MLP = {ours: theirs for ours, theirs in TENSORS.items() if ".mlp." not in ours}


def read(config: Any) -> TransformerSpec:
    """A LlamaConfig as our spec."""
    require(config, "pretraining_tp", 1, None)
    bias = config.attention_bias
    return gated(config, attention_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)


def gated(
    config: Any, attention_bias: bool, output_bias: bool, mlp_bias: bool = False
) -> TransformerSpec:
    """The spec that Llama and its relatives share, from the fields that their configs share."""
    size = head_size(config)
    return TransformerSpec(
        family=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=size,
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        rotary=rotary(config, size),
        activation=choose(config, "hidden_act", ACTIVATIONS),
        gated=True,
        attention_bias=attention_bias,
        attention_output_bias=output_bias,
        mlp_bias=mlp_bias,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        padding_id=padding(config),
        attention_dropout=getattr(config, "attention_dropout", None) or 0.0,
    )


FAMILY = Family(read, TENSORS)
