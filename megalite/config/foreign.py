"""Keys of a JSON that was written for another trainer and have no effect here: those that are off, and "auto".

Hugging Face's Trainer replaces `auto` by its own arguments; here `auto` becomes their default, or the key is left out.
A note says which, and names keys without effect. Next: rules.py.
"""

import json
from typing import Any

from megalite.config.section import Section, join, sections_of

LEFT_OUT = object()
_DERIVED = "it follows from the other two batch sizes"
AUTO: dict[
    str, Any
] = {  # by key: the value in place of `auto`, or (LEFT_OUT, what applies instead)
    "train_batch_size": (LEFT_OUT, _DERIVED),
    "train_micro_batch_size_per_gpu": (LEFT_OUT, _DERIVED),
    "gradient_accumulation_steps": (LEFT_OUT, _DERIVED),
    "gradient_clipping": 1.0,
    "bf16.enabled": False,
    "fp16.enabled": False,
    "optimizer.params.lr": 5e-5,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.0,
    "scheduler.params.warmup_min_lr": 0.0,
    "scheduler.params.warmup_max_lr": (LEFT_OUT, "optimizer.params.lr applies"),
    "scheduler.params.warmup_num_steps": 1,
    "scheduler.params.total_num_steps": (LEFT_OUT, "megalite.train.steps applies"),
    "zero_optimization.reduce_bucket_size": (LEFT_OUT, "4e7 applies"),
    "zero_optimization.stage3_prefetch_bucket_size": (LEFT_OUT, "DeepSpeed's 5e7 applies"),
    "zero_optimization.stage3_param_persistence_threshold": (LEFT_OUT, "DeepSpeed's 1e5 applies"),
}
IDLE = {  # keys that are often true, for things that megalite does in its own way or does not need
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoints always contain whole tensors",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "checkpoints always contain whole tensors",
    "zero_allow_untested_optimizer": "every supported optimizer.type is tested",
}


def without_foreign(section: type[Section], value: Any, path: str = "") -> tuple[Any, list[str]]:
    """`value`, which is at the dotted `path` of the JSON, without such keys; and the notes about them."""
    if not isinstance(value, dict):
        return value, []
    result, notes = {}, []
    for key, inner in value.items():
        here = join(path, key)
        if key in section.refused and is_off(section, key, inner):
            continue
        if here in IDLE and inner is True:
            notes.append(f"{here}: true has no effect: {IDLE[here]}")
            continue
        if inner == "auto" and here in AUTO:
            becomes = AUTO[here]
            if isinstance(becomes, tuple):
                notes.append(f"{here}: auto is left out: {becomes[1]}")
                continue
            notes.append(f"{here}: auto becomes {json.dumps(becomes)}")
            inner = becomes
        field = section.model_fields.get(key)
        inside = sections_of(field.annotation) if field is not None else []
        result[key], more = without_foreign(inside[0] if inside else Section, inner, here)
        notes += more
    return result, notes


def is_off(section: type[Section], key: str, value: Any) -> bool:
    """Whether a rejected key has a value that changes nothing."""
    return value in section.neutral[key] if key in section.neutral else _is_off(value)


def _is_off(value: Any) -> bool:
    """Whether a value is false, null, an object that is not enabled, or an object whose values are all off."""
    if not isinstance(value, dict):
        return value is None or value is False
    if "enabled" in value:
        return value["enabled"] is False
    return all(map(_is_off, value.values()))
