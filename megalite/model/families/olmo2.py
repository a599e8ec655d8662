"""OLMo 2 (arXiv 2501.00656): Llama with norms of the outputs of attention and MLP, and of all queries and all keys.

In 16-bit types transformers rounds OLMo 2's norms once, after the weight; ours round twice, as for Llama. In fp32 they
are equal.
"""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.common import tensors
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

TENSORS = (
    llama.TENSORS
    | llama.QUERY_AND_KEY_NORMS
    | tensors(
        {
            "layers.{layer}.attention_norm": "model.layers.{layer}.post_attention_layernorm",
            "layers.{layer}.mlp_norm": "model.layers.{layer}.post_feedforward_layernorm",
        }
    )
)


def read(config: Any) -> TransformerSpec:
    """An Olmo2Config as our spec."""
    spec = llama.gated(
        config, attention_bias=config.attention_bias, output_bias=config.attention_bias
    )
    return replace(spec, norm_position="after", qk_norm="projection")


FAMILY = Family(read, TENSORS, old_keys=HEAD_DIM)
