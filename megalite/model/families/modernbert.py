"""ModernBERT (arXiv 2412.13663): an encoder with norms before attention and MLP, but none before the first attention
(the embedding has one), gated GELU, rotary embeddings, and layers with a window to both sides between layers with full
attention; each kind has its own rotary settings.

transformers draws initial weights from a normal truncated at `initializer_cutoff_factor` standard deviations; ours are
not truncated, but have the same standard deviation as those.
"""

import math
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families.common import (
    ACTIVATIONS,
    KEY,
    QUERY_KEY_VALUE,
    choose,
    equal_head_size,
    fused,
    padding,
    require,
    rotary,
    tensors,
    windows,
    written,
)
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

_LAYER = "model.layers.{layer}"
TENSORS = (
    tensors(
        {
            "embedding.tokens": "model.embeddings.tok_embeddings",
            "embedding.norm": "model.embeddings.norm",
            "layers.{layer}.attention_norm": f"{_LAYER}.attn_norm",
            "layers.{layer}.attention.output": f"{_LAYER}.attn.Wo",
            "layers.{layer}.mlp_norm": f"{_LAYER}.mlp_norm",
            "layers.{layer}.mlp.down": f"{_LAYER}.mlp.Wo",
            "final_norm": "model.final_norm",
            "head.transform.dense": "head.dense",
            "head.transform.norm": "head.norm",
            "head": "decoder",
        }
    )
    | fused(QUERY_KEY_VALUE, f"{_LAYER}.attn.Wqkv")
    | fused(("layers.{layer}.mlp.gate", "layers.{layer}.mlp.up"), f"{_LAYER}.mlp.Wi")
)
_OLD_KEYS = frozenset(
    (
        "global_attn_every_n_layers",
        "global_rope_theta",
        "local_rope_theta",
        "reference_compile",
    )
)


def read(config: Any) -> TransformerSpec:
    """A ModernBertConfig as our spec."""
    require(config, "mlp_dropout", 0, 0.0)
    size, kinds = equal_head_size(config), config.rope_parameters
    by_kind = {
        kind: rotary(config, size, kinds[kind], f"rope_parameters.{kind}")
        for kind in set(config.layer_types)
    }
    local = by_kind.get("sliding_attention")
    everywhere = by_kind.get("full_attention", local)
    # Our windows count the token itself.
    spans = tuple(None if span is None else span + 1 for span in windows(config))
    return TransformerSpec(
        family="modernbert",
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=size,
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_bias=config.norm_bias,
        norm_eps=config.norm_eps,
        rotary=everywhere,
        local_rotary=local,
        windows=spans,
        activation=choose(config, "hidden_activation", ACTIVATIONS),
        gated=True,
        attention_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range * _spread(config.initializer_cutoff_factor),
        depth_scaled_init=True,
        first_norm=False,
        causal=False,
        embedding_norm=True,
        head_transform=choose(config, "classifier_activation", ACTIVATIONS),
        head_transform_bias=config.classifier_bias,
        head_bias=config.decoder_bias,
        padding_id=padding(config),
        embedding_dropout=config.embedding_dropout,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.attention_dropout,
        drops_mlp=False,
    )


def _spread(cutoff: Any) -> float:
    """Standard deviation of a standard normal truncated at ± cutoff; None: 3, as in transformers."""
    cutoff = 3.0 if cutoff is None else cutoff
    if isinstance(cutoff, bool) or not isinstance(cutoff, int | float) or not 0 < cutoff < math.inf:
        raise ConfigError(
            f"{KEY}.initializer_cutoff_factor: {written(cutoff)}: must be a positive number"
        )
    density = math.exp(-(cutoff**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cutoff * density / math.erf(cutoff / math.sqrt(2)))


FAMILY = Family(read, TENSORS, old_keys=_OLD_KEYS)
