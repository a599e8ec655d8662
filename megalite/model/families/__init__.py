"""Hugging Face configs into our spec, and the names of their files' tensors: one module a family. How to add one:
CONTRIBUTING.md.

A family's module has `read`, from a transformers config to our spec; `TENSORS`, our names to the files'; and where it
needs them `OLD_KEYS`, keys of a config that are no fields of its class, `UNUSED`, a pattern of names of tensors in its
files that the model does not use, and `ROUTER_BIAS`, the name there of the biases that experts are chosen by.
An encoder-decoder's has `tensors_of_layer`, since its files number the layers of each stack; `ALLOWED`, fields that
others refuse; `COPIES`, tensors of its files that must equal the embedding; and `amend`, for what its config class
forgets.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megalite import other_formats
from megalite.config.objectives import Classified
from megalite.errors import ConfigError
from megalite.inputs import read_json_object, reading
from megalite.model.families import (
    bert,
    ernie4_5_moe,
    eurobert,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    olmoe,
    phi,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
from megalite.model.families.classifiers import classified, is_classifier, make_classifier
from megalite.model.families.common import KEY, check_sizes, check_spec, written
from megalite.model.spec import TransformerSpec

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "olmo2": olmo2,
    "olmoe": olmoe,
    "ernie4_5_moe": ernie4_5_moe,
    "gpt2": gpt2,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "bert": bert,
    "roberta": roberta,
    "modernbert": modernbert,
    "eurobert": eurobert,
    "t5": t5,
}
# Older names and places of fields that transformers still reads.
_OLD_KEYS = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "torch_dtype",
}
# Fields that any config may have and that change the function, with the values by which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
}
PREFIX_LM = "prefix_lm"
"""A key of ours in the config.json of an exported model whose prompts are seen both ways, which no class of
transformers' knows."""
Section = dict[str, Any] | str | Classified
"""The model section: inline keys, or a folder with a config.json; with labels, a classifier made of either."""
_SHOWN_CHARACTERS = 300  # of what transformers says
_VALIDATOR = re.compile(r"^Class validation error for validator '\w+': \w+: ")
_log = logging.getLogger("megalite")
_told: set[str] = set()  # files whose unknown keys have been listed


def load_hf_config(section: Section) -> Any:
    """The transformers config that the model section describes.

    Unknown inline keys, unknown families and values that transformers refuses are ConfigErrors of one line; a
    folder's unknown keys are listed once in the log.
    """
    if isinstance(section, Classified):
        config = load_hf_config(section.section)
        make_classifier(config, section)
        return config
    where = _place(section)
    if isinstance(section, str) and (found := other_formats.hub_name(section)):
        raise ConfigError(f"{KEY}: {section}: {found}")
    values = read_json_object(where) if isinstance(section, str) else dict(section)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type: {written(model_type)}: must be one of {', '.join(FAMILIES)}"
        )
    _check_values(model_type, values, where)
    try:
        with _quiet_transformers():
            config = config_of(model_type, values)
    except Exception as error:
        said = _VALIDATOR.sub("", " ".join(str(error).split()))
        raise ConfigError(f"{where}: {said[:_SHOWN_CHARACTERS]}") from error
    known = _known_keys(config)
    unknown = [key for key in values if key not in known and key not in _REFUSED]
    if where != KEY and PREFIX_LM in unknown:
        unknown.remove(PREFIX_LM)  # hub/hf_folder.py reads it
    if unknown and where == KEY:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{KEY}.{unknown[0]}: unknown key of a {model_type} config{hint}")
    if unknown and where not in _told:
        _told.add(where)
        names = ", ".join(sorted(unknown))
        _log.warning("%s: keys that a %s model does not use: %s", where, model_type, names)
    return config


def _check_values(model_type: str, values: dict[str, Any], where: str) -> None:
    """Refuses sizes that are none, and fields that would change the function, before transformers sees them."""
    sizes = dict(values)
    # A Qwen2MoeConfig writes 0 where no layer has a window; check_spec refuses it of those that have.
    if sizes.get("sliding_window") == 0:
        del sizes["sliding_window"]
    check_sizes(sizes, f"{KEY}." if where == KEY else f"{where}: ")
    refused = _REFUSED | getattr(FAMILIES[model_type], "ALLOWED", {})
    for key in values.keys() & refused.keys():
        if values[key] not in refused[key]:
            raise ConfigError(
                f"{where}: {key}: {written(values[key])}: is not honoured: leave it out"
            )


def config_of(model_type: str, values: dict[str, Any]) -> Any:
    """The transformers config of a family's values."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **values)
    amend = getattr(FAMILIES[model_type], "amend", None)
    if amend is not None:
        amend(config)
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


def _place(section: Section) -> str:
    """Where a model section is, for its errors."""
    if isinstance(section, Classified):
        return _place(section.section)
    return str(Path(section) / "config.json") if isinstance(section, str) else KEY


def read_spec(section: Section) -> TransformerSpec:
    """The model section as our spec; ConfigError names a field that changes the function and is not honoured."""
    config = load_hf_config(section)
    try:
        # By transformers: a value of another type than a field's shows where it is used.
        with reading(_place(section)):
            spec = FAMILIES[config.model_type].read(config)
            spec = classified(config, spec) if is_classifier(config) else spec
            check_spec(spec)
    except ConfigError as error:
        if _place(section) == KEY:
            raise
        # In a folder the mistake is not under a key of the run's config.
        line = str(error).removeprefix(KEY).lstrip(".: ")
        raise ConfigError(f"{_place(section)}: {line}") from None
    return spec


def model_dict(section: Section) -> dict[str, Any]:
    """The model section as a plain Hugging Face config that needs no other file, for a checkpoint: keys that the
    family does not have are left out."""
    config = load_hf_config(section)
    known = _known_keys(config) - {"transformers_version"} | {"model_type"}
    with reading(_place(section)):
        return {key: value for key, value in config.to_diff_dict().items() if key in known}


def _known_keys(config: Any) -> set[str]:
    """The keys that transformers gives a meaning in a config of this one's family."""
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    known |= getattr(FAMILIES[config.model_type], "OLD_KEYS", set())
    return known | (_OLD_KEYS if hasattr(config, "rope_parameters") else {"torch_dtype"})
