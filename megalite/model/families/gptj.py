"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP in parallel after one norm, interleaved rotary embeddings, a
bias on the head but none in attention."""

from typing import Any

from megalite.errors import ConfigError
from megalite.model.families.common import ACTIVATIONS, KEY, choose, equal_head_size, tensors
from megalite.model.families.family import Family
from megalite.model.spec import Rotary, TransformerSpec

TENSORS = tensors(
    {
        "embedding.tokens": "transformer.wte",
        "layers.{layer}.attention_norm": "transformer.h.{layer}.ln_1",
        "layers.{layer}.attention.query": "transformer.h.{layer}.attn.q_proj",
        "layers.{layer}.attention.key": "transformer.h.{layer}.attn.k_proj",
        "layers.{layer}.attention.value": "transformer.h.{layer}.attn.v_proj",
        "layers.{layer}.attention.output": "transformer.h.{layer}.attn.out_proj",
        "layers.{layer}.mlp.up": "transformer.h.{layer}.mlp.fc_in",
        "layers.{layer}.mlp.down": "transformer.h.{layer}.mlp.fc_out",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }
)


def read(config: Any) -> TransformerSpec:
    """A GPTJConfig as our spec."""
    size, turning = equal_head_size(config), config.rotary_dim
    if not turning or turning % 2 or turning > size:
        raise ConfigError(
            f"{KEY}.rotary_dim: {turning}: must be even and at most the head's {size} features"
        )
    return TransformerSpec(
        family="gptj",
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_size=size,
        intermediate_size=4 * config.n_embd if config.n_inner is None else config.n_inner,
        vocabulary_size=config.vocab_size,
        max_positions=config.n_positions,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        rotary=Rotary(theta=10000.0, size=turning, interleaved=True),
        activation=choose(config, "activation_function", ACTIVATIONS),
        gated=False,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=True,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        parallel=True,
        shared_norm=True,
        head_bias=True,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
    )


FAMILY = Family(read, TENSORS)
