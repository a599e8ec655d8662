"""Hugging Face configs into our spec, and the names of their files' tensors: one module a family.

To add a family, in ten lines:
1. Read transformers' `configuration_X.py` and `modeling_X.py` beside spec.py: each choice must be one that the spec
   has. Where one is missing, it becomes a field of the spec and a branch of the block, by its idea, not its family.
2. Write `families/X.py` with `read(config) -> TransformerSpec`. A relative of Llama starts from `llama.gated`.
3. Go through every field of the config class. One that changes the function is read, or refused by `require` and
   `choose`, which name it; one that does not (`use_cache`) is left alone.
4. Add `TENSORS`, our names to the files': `tensors` takes pairs of modules; fused ones are `HFTensor`s with parts.
5. Put the module into FAMILIES below.
6. Add a small config of odd sizes to `tests/families.py`. The tests there hold logits, gradients, names and every
   field of the config against transformers' own model, on one rank and on a pipe × tensor grid.
"""

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megalite.errors import ConfigError
from megalite.model.families import gpt2, gpt_neox, gptj, llama, mistral, olmo2, phi, qwen2, qwen3
from megalite.model.families.common import KEY, check_spec
from megalite.model.spec import TransformerSpec

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "gpt2": gpt2,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "phi": phi,
}
# Older names and places of fields that transformers still reads.
_OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "torch_dtype"}
# Fields that any config may have and that change the function, with the values by which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
}
_log = logging.getLogger("megalite")
_told: set[str] = set()  # files whose unknown keys have been listed


def load_hf_config(section: dict[str, Any] | str) -> Any:
    """The transformers config that the model section describes: inline keys, or a folder with a config.json.

    Unknown inline keys, unknown families and values that transformers refuses are ConfigErrors of one line; a
    folder's unknown keys are listed once in the log.
    """
    from transformers import AutoConfig

    where = str(Path(section) / "config.json") if isinstance(section, str) else KEY
    values = _read_folder(where) if isinstance(section, str) else dict(section)
    model_type = values.pop("model_type", None)
    if model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type: {model_type!r}: must be one of {', '.join(FAMILIES)}")
    for key in values.keys() & _REFUSED.keys():
        if values[key] not in _REFUSED[key]:
            raise ConfigError(f"{where}: {key}: {values[key]!r}: is not honoured: leave it out")
    try:
        with _quiet_transformers():
            config = AutoConfig.for_model(model_type, **values)
    except Exception as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    known = _known_keys(config)
    unknown = [key for key in values if key not in known and key not in _REFUSED]
    if unknown and where == KEY:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{KEY}.{unknown[0]}: unknown key of a {model_type} config{hint}")
    if unknown and where not in _told:
        _told.add(where)
        _log.warning("%s: keys that a %s model does not use: %s", where, model_type, ", ".join(sorted(unknown)))
    return config


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its warnings are of what `read` refuses in a line, or of generation."""
    from transformers.utils import logging as noise

    level = noise.get_verbosity()
    noise.set_verbosity_error()
    try:
        yield
    finally:
        noise.set_verbosity(level)


def _read_folder(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{KEY}: {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{KEY}: {path}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{KEY}: {path}: must hold one JSON object")
    return values


def read_spec(section: dict[str, Any] | str) -> TransformerSpec:
    """The model section as our spec; ConfigError names a field that changes the function and is not honoured."""
    config = load_hf_config(section)
    try:
        spec = FAMILIES[config.model_type].read(config)
        check_spec(spec)
    except ConfigError as error:
        if isinstance(section, str):  # there the mistake is not in the JSON
            raise ConfigError(str(error).replace(f"{KEY}.", f"{Path(section) / 'config.json'}: ", 1)) from None
        raise
    return spec


def model_dict(section: dict[str, Any] | str) -> dict[str, Any]:
    """The model section as a plain Hugging Face config that stands on its own, for a checkpoint: keys that the
    family does not have are left out."""
    config = load_hf_config(section)
    known = _known_keys(config) - {"transformers_version"} | {"model_type"}
    return {key: value for key, value in config.to_diff_dict().items() if key in known}


def _known_keys(config: Any) -> set[str]:
    """The keys that transformers gives a meaning in a config of this one's family."""
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    return known | (_OLD_KEYS if hasattr(config, "rope_parameters") else {"torch_dtype"})
