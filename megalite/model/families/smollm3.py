"""SmolLM3 (Hugging Face, 2025): Llama with some layers without rotary embeddings (NoPE, arXiv 2501.18795), which may
have a sliding window."""

from dataclasses import replace
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families import llama
from megalite.model.families.common import windows, written
from megalite.model.families.family import HEAD_DIM, Family
from megalite.model.spec import TransformerSpec

_LAYERS = 36  # the config class's default


def check(values: dict[str, Any], where: str) -> None:
    """Rejects a list that is too short, which the config class would read beyond its end."""
    has_rotary, layers = values.get("no_rope_layers"), values.get("num_hidden_layers") or _LAYERS
    if has_rotary is None:
        return
    is_list = isinstance(has_rotary, list) and all(value in (0, 1) for value in has_rotary)
    if not is_list or len(has_rotary) < layers:
        rule = f"must be a list of at least {layers} numbers, 1 (rotary embeddings) or 0 (none)"
        raise ConfigError(f"{where}no_rope_layers: {written(has_rotary)}: {rule}")


def read(config: Any) -> TransformerSpec:
    """A SmolLM3Config as our spec."""
    bias = config.attention_bias
    spec = llama.gated(config, attention_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
    nope = (layer for layer in range(spec.num_layers) if not config.no_rope_layers[layer])
    return replace(spec, windows=windows(config), nope_layers=tuple(nope))


FAMILY = Family(read, llama.TENSORS, old_keys=HEAD_DIM, check=check)
