"""BERT (arXiv 1810.04805), for masked language modelling: an encoder with norms after residual sums, learned positions,
a norm of the embedding, and a dense layer before the head. RoBERTa is based on it.

The pooler and the next-sentence head in some files are not part of the model; transformers' class for masked language
modelling leaves them out too. Untied embeddings are rejected, because that class then has a bias that it never adds.
"""

import re
from typing import Any

from megalite.model.families.common import (
    ACTIVATIONS,
    HFTensor,
    choose,
    equal_head_size,
    padding,
    require,
    tensors,
)
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec


def encoder_tensors(base: str) -> dict[str, HFTensor]:
    """The table of embedding and layers. base: the files' name for the model without its head."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return tensors(
        {
            "embedding.tokens": f"{base}.embeddings.word_embeddings",
            "embedding.norm": f"{base}.embeddings.LayerNorm",
            "layers.{layer}.attention.query": f"{layer}.attention.self.query",
            "layers.{layer}.attention.key": f"{layer}.attention.self.key",
            "layers.{layer}.attention.value": f"{layer}.attention.self.value",
            "layers.{layer}.attention.output": f"{layer}.attention.output.dense",
            "layers.{layer}.attention_norm": f"{layer}.attention.output.LayerNorm",
            "layers.{layer}.mlp.up": f"{layer}.intermediate.dense",
            "layers.{layer}.mlp.down": f"{layer}.output.dense",
            "layers.{layer}.mlp_norm": f"{layer}.output.LayerNorm",
        }
    ) | {
        "embedding.positions": HFTensor(f"{base}.embeddings.position_embeddings.weight"),
        "embedding.types": HFTensor(f"{base}.embeddings.token_type_embeddings.weight"),
    }


TENSORS = (
    encoder_tensors("bert")
    | tensors(
        {
            "head.transform.dense": "cls.predictions.transform.dense",
            "head.transform.norm": "cls.predictions.transform.LayerNorm",
        }
    )
    | {
        "head.weight": HFTensor("cls.predictions.decoder.weight"),
        "head.bias": HFTensor("cls.predictions.bias"),
    }
)
_UNUSED = re.compile(
    r"^(bert\.pooler\.|cls\.seq_relationship\.|bert\.embeddings\.position_ids$|cls\.predictions\.decoder\.bias$)"
)
"""Tensors in the files that the model does not have, such as a second copy of the head's bias."""


def read(config: Any) -> TransformerSpec:
    """A BertConfig as our spec."""
    return encoder(config)


def encoder(config: Any) -> TransformerSpec:
    """The spec that BERT and RoBERTa share."""
    require(config, "is_decoder", False)
    require(config, "tie_word_embeddings", True)
    return TransformerSpec(
        family=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=equal_head_size(config),
        intermediate_size=config.intermediate_size,
        vocabulary_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        rotary=None,
        activation=choose(config, "hidden_act", ACTIVATIONS),
        gated=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tied=True,
        init_std=config.initializer_range,
        norm_position="sum",
        causal=False,
        token_types=config.type_vocab_size,
        embedding_norm=True,
        final_norm=False,
        head_transform=choose(config, "hidden_act", ACTIVATIONS),
        head_bias=True,
        padding_id=padding(config),
        embedding_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        hidden_dropout=config.hidden_dropout_prob,
    )


FAMILY = Family(read, TENSORS, unused=_UNUSED)
