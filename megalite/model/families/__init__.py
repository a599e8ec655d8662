"""Converts Hugging Face configs to our spec, and maps the names of tensors in their files: one module per family.
CONTRIBUTING.md says how to add one.

Each family's module ends with its `FAMILY`; family.py says what belongs to one.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
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
    smollm3,
    t5,
)
from megalite.model.families.classifiers import classified, is_classifier, make_classifier
from megalite.model.families.common import KEY, check_sizes, check_spec, written
from megalite.model.families.family import Family
from megalite.model.spec import TransformerSpec

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmoe": olmoe.FAMILY,
    "ernie4_5_moe": ernie4_5_moe.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gptj": gptj.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "phi": phi.FAMILY,
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "modernbert": modernbert.FAMILY,
    "eurobert": eurobert.FAMILY,
    "t5": t5.FAMILY,
}
# Old names and locations of fields that transformers still reads.
_OLD_KEYS = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_emb_base",
    "torch_dtype",
}
# Fields of any config that change the function, with the values for which they do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
}
PREFIX_LM = "prefix_lm"
END = "eos_token_id"
"""Our key in the config.json of an exported model whose prompts have bidirectional attention, which no class of
transformers supports."""
Section = dict[str, Any] | str | Classified
"""The model section: inline keys, or a folder with a config.json; or either with labels, for a classifier."""
_SHOWN_CHARACTERS = 300  # of an error message of transformers
_VALIDATOR = re.compile(r"^Class validation error for validator '\w+': \w+: ")
_log = logging.getLogger("megalite")
_listed: set[str] = set()  # files whose unknown keys have been listed in the log


def load_hf_config(section: Section) -> Any:
    """The transformers config that the model section describes.

    Raises ConfigError with one line for unknown inline keys, unknown families and values that transformers rejects;
    a folder's unknown keys are listed once in the log.
    """
    if isinstance(section, Classified):
        config = load_hf_config(section.section)
        make_classifier(config, section)
        return config
    where = _source_of(section)
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
    if unknown and where not in _listed:
        _listed.add(where)
        names = ", ".join(sorted(unknown))
        _log.warning("%s: keys that a %s model does not use: %s", where, model_type, names)
    return config


def _check_values(model_type: str, values: dict[str, Any], where: str) -> None:
    """Rejects invalid sizes, and fields that would change the function, before transformers reads them."""
    sizes = dict(values)
    # A Qwen2MoeConfig writes 0 if no layer has a window; check_spec rejects 0 if a layer has one.
    if sizes.get("sliding_window") == 0:
        del sizes["sliding_window"]
    prefix = f"{KEY}." if where == KEY else f"{where}: "
    check_sizes(sizes, prefix)
    family = FAMILIES[model_type]
    if family.check is not None:
        family.check(values, prefix)
    refused = {**_REFUSED, **family.allowed}
    for key in values.keys() & refused.keys():
        if values[key] not in refused[key]:
            raise ConfigError(
                f"{where}: {key}: {written(values[key])}: is not supported: leave it out"
            )


def config_of(model_type: str, values: dict[str, Any]) -> Any:
    """The transformers config of a family with these values."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **values)
    if (amend := FAMILIES[model_type].amend) is not None:
        amend(config)
    return config


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings: they are about fields that `read` rejects with an error, or about generation."""
    from transformers.utils import logging as noise

    level = noise.get_verbosity()
    noise.set_verbosity_error()
    try:
        yield
    finally:
        noise.set_verbosity(level)


def _source_of(section: Section) -> str:
    """The location of a model section, for errors."""
    if isinstance(section, Classified):
        return _source_of(section.section)
    return str(Path(section) / "config.json") if isinstance(section, str) else KEY


def read_spec(section: Section) -> TransformerSpec:
    """The model section as our spec. Raises ConfigError that names a field that changes the function and is not
    supported."""
    config = load_hf_config(section)
    try:
        # transformers does not check all types: a value of the wrong type raises only when it is used.
        with reading(_source_of(section)):
            spec = FAMILIES[config.model_type].read(config)
            spec = classified(config, spec) if is_classifier(config) else spec
            check_spec(spec)
    except ConfigError as error:
        if _source_of(section) == KEY:
            raise
        # The mistake is in the folder's config.json, not under a key of the run's config.
        line = str(error).removeprefix(KEY).lstrip(".: ")
        raise ConfigError(f"{_source_of(section)}: {line}") from None
    return spec


def model_dict(section: Section) -> dict[str, Any]:
    """The model section as a self-contained Hugging Face config, for a checkpoint; without keys that the family does
    not have. `eos_token_id` is None unless the section has it: the family's default is the end of another
    tokenizer's texts."""
    config = load_hf_config(section)
    known = _known_keys(config) - {"transformers_version"} | {"model_type"}
    with reading(_source_of(section)):
        model = {key: value for key, value in config.to_diff_dict().items() if key in known}
    own = section.section if isinstance(section, Classified) else section
    if isinstance(own, dict) and END not in own:
        model[END] = None
    return model


def _known_keys(config: Any) -> set[str]:
    """The keys that have a meaning for transformers in a config of this family."""
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    known |= FAMILIES[config.model_type].old_keys
    return known | (_OLD_KEYS if hasattr(config, "rope_parameters") else {"torch_dtype"})
