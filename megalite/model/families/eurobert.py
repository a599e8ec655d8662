"""EuroBERT (arXiv 2503.05500): Llama as a masked-language-model encoder; the head has a bias if the MLP does."""

from dataclasses import replace
from typing import Any

from megalite.model.families import llama
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec


def read(config: Any) -> TransformerSpec:
    """A EuroBertConfig as our spec."""
    return replace(llama.read(config), causal=False, head_bias=config.mlp_bias)


FAMILY = Family(read, llama.TENSORS)
