"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases. Its files store matrices as [in, out]
(transformers' Conv1D) and q, k, v fused."""

from typing import Any

from megalite.model.families.common import (
    ACTIVATIONS,
    QUERY_KEY_VALUE,
    HFTensor,
    choose,
    equal_head_size,
    fused,
    require,
    tensors,
)
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

_CONV1D = ("layers.{layer}.attention.output", "layers.{layer}.mlp.up", "layers.{layer}.mlp.down")
TENSORS = (
    tensors(
        {
            "embedding.tokens": "transformer.wte",
            "layers.{layer}.attention_norm": "transformer.h.{layer}.ln_1",
            "layers.{layer}.attention.output": "transformer.h.{layer}.attn.c_proj",
            "layers.{layer}.mlp_norm": "transformer.h.{layer}.ln_2",
            "layers.{layer}.mlp.up": "transformer.h.{layer}.mlp.c_fc",
            "layers.{layer}.mlp.down": "transformer.h.{layer}.mlp.c_proj",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        transposed=_CONV1D,
    )
    | fused(QUERY_KEY_VALUE, "transformer.h.{layer}.attn.c_attn", transposed=True)
    | {"embedding.positions": HFTensor("transformer.wpe.weight")}
)


def read(config: Any) -> TransformerSpec:
    """A GPT2Config as our spec."""
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    require(config, "reorder_and_upcast_attn", False)
    return TransformerSpec(
        family="gpt2",
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_size=equal_head_size(config),
        intermediate_size=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocabulary_size=config.vocab_size,
        max_positions=config.n_positions,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        rotary=None,
        activation=choose(config, "activation_function", ACTIVATIONS),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        depth_scaled_init=True,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
    )


FAMILY = Family(read, TENSORS)
