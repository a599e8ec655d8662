"""SmolLM3 (Hugging Face, 2025): Llama in which some layers have no rotary positions (NoPE, arXiv 2501.18795), and those
may have a sliding window."""

from dataclasses import replace
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families import llama
from megalite.model.families.common import windows, written
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

_LAYERS = 36  # of a config that does not say how many


def check(values: dict[str, Any], where: str) -> None:
    """Refuses a list that the config class would read beyond its end."""
    turned, layers = values.get("no_rope_layers"), values.get("num_hidden_layers") or _LAYERS
    if turned is None:
        return
    is_list = isinstance(turned, list) and all(value in (0, 1) for value in turned)
    if not is_list or len(turned) < layers:
        rule = f"must be a list of 1 (rotary positions) and 0 (none), at least {layers} of them"
        raise ConfigError(f"{where}no_rope_layers: {written(turned)}: {rule}")


def read(config: Any) -> TransformerSpec:
    """A SmolLM3Config as our spec."""
    bias = config.attention_bias
    spec = llama.gated(config, attention_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
    nope = (layer for layer in range(spec.num_layers) if not config.no_rope_layers[layer])
    return replace(spec, windows=windows(config), nope_layers=tuple(nope))


FAMILY = Family(read, llama.TENSORS, old_keys=HEAD_DIM, check=check)
