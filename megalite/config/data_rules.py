"""The rules of `megalite.data`: samples, order, loss, objective and blends.

Each function takes the validated document (or sizes) and raises ConfigError with one line that names the key, its
value and the rule.
"""

import json

from megalite.config.document import ModelDims
from megalite.config.masks import Masked
from megalite.config.objectives import Classes
from megalite.config.parallel_keys import Parallel
from megalite.config.section import broken
from megalite.config.sections import Data, Megalite
from megalite.config.stack_rules import check_objective_of_stacks, check_source_target
from megalite.errors import ConfigError

# Least share of a corpus in a blend: below it, data/blend.py would step through millions of positions.
LEAST_SHARE = 1e-6


def check_data_keys(data: Data) -> None:
    if data.eod_mask_loss and data.tokenizer is None:
        rule = "needs megalite.data.tokenizer, which defines the token"
        raise broken("megalite.data.eod_mask_loss", True, rule)
    if data.megatron_samples is not None and data.order != "megatron":
        rule = 'needs megalite.data.order "megatron"'
        raise broken("megalite.data.megatron_samples", data.megatron_samples, rule)
    if data.samples == "packed" and not data.reset_attention:
        raise broken("megalite.data.samples", "packed", "needs megalite.data.reset_attention true")
    if data.samples != "windows" and data.order == "megatron":
        rule = 'must be "windows" with megalite.data.order "megatron"'
        raise broken("megalite.data.samples", data.samples, rule)
    _check_masked(data)
    _check_classes(data)
    check_source_target(data)
    _check_prefix(data)
    for name, sources in (("train", data.train), ("valid", data.valid)):
        for i, source in enumerate(sources):
            if source.split is not None and source.split[0] >= source.split[1]:
                rule = "must be [from, to] with from < to"
                raise broken(f"megalite.data.{name}.{i}.split", source.split, rule)
    least = min(source.weight for source in data.train)
    total = sum(source.weight for source in data.train)
    if least < LEAST_SHARE * total:
        i = next(i for i, source in enumerate(data.train) if source.weight == least)
        rule = f"must be at least {LEAST_SHARE:g} of the sum of all weights {total:g}"
        raise broken(f"megalite.data.train.{i}.weight", least, rule)


def _check_masked(data: Data) -> None:
    """The settings that masked language modelling requires."""
    objective = data.objective
    if not isinstance(objective, Masked):
        return
    path = "megalite.data.objective"
    if objective.keep + objective.swap > 1:
        rule = f"must be at most 1 together with {path}.swap {objective.swap}"
        raise broken(f"{path}.keep", objective.keep, rule)
    if data.tokenizer is None and objective.mask_token_id is None:
        raise ConfigError(
            f"{path}.mask_token_id: missing: give it or megalite.data.tokenizer, which has a mask token"
        )
    if data.tokenizer is None and objective.whole_word:
        rule = "needs megalite.data.tokenizer, whose tokens show where words begin"
        raise broken(f"{path}.whole_word", True, rule)
    with_masks = f"with a masked {path}"
    _check_whole(data, with_masks)
    if data.samples != "windows" and not data.reset_attention:
        rule = f"needs megalite.data.reset_attention true {with_masks}: tokens would attend to the padding"
        raise broken("megalite.data.samples", data.samples, rule)
    if data.eod_mask_loss:
        rule = f"must be false {with_masks}: special tokens are never masked"
        raise broken("megalite.data.eod_mask_loss", True, rule)


def _check_whole(data: Data, with_objective: str) -> None:
    """Settings that only the causal objective can change."""
    for key, value, only in (
        ("order", data.order, "shuffled"),
        ("loss", data.loss or "all", "all"),
    ):
        if value != only:
            raise broken(f"megalite.data.{key}", value, f'must be "{only}" {with_objective}')


def _check_classes(data: Data) -> None:
    """The settings that classification requires."""
    objective = data.objective
    if not isinstance(objective, Classes):
        return
    path = "megalite.data.objective.classes"
    with_classes = f"with {path}"
    if len(set(objective.classes)) < len(objective.classes):
        raise broken(path, objective.classes, "must name each label once")
    _check_whole(data, with_classes)
    if data.samples == "windows":
        rule = f'must be "packed" or "padded" {with_classes}: each label belongs to a whole text'
        raise broken("megalite.data.samples", data.samples, rule)
    if not data.reset_attention:
        rule = f"must be true {with_classes}: a text must not attend to other texts in its sample"
        raise broken("megalite.data.reset_attention", False, rule)
    if data.eod_mask_loss:
        rule = f"must be false {with_classes}: no token is predicted"
        raise broken("megalite.data.eod_mask_loss", True, rule)


def _check_prefix(data: Data) -> None:
    """The settings that prompts with bidirectional attention require."""
    if data.objective != "prefix":
        return
    with_prefix = 'with megalite.data.objective "prefix"'
    if data.loss != "marked":
        rule = f'must be "marked" {with_prefix}: the prompt is the tokens before the marked ones'
        raise broken("megalite.data.loss", data.loss, rule)
    if data.samples == "windows":
        rule = f'must be "packed" or "padded" {with_prefix}: each prompt begins a whole document'
        raise broken("megalite.data.samples", data.samples, rule)
    if not data.reset_attention:
        rule = (
            f"must be true {with_prefix}: a prompt must not attend to other documents in its sample"
        )
        raise broken("megalite.data.reset_attention", False, rule)
    if data.eod_mask_loss:
        rule = f"must be false {with_prefix}: every marked token is predicted"
        raise broken("megalite.data.eod_mask_loss", True, rule)


def check_undivided(parallel: Parallel, data: Data) -> None:
    """The context axis cannot divide a prompt whose tokens attend to each other in both directions."""
    if data.objective == "prefix" and parallel.context > 1:
        rule = 'must be 1 with megalite.data.objective "prefix": the tokens of a prompt cannot be divided'
        raise broken("megalite.parallel.context", parallel.context, rule)


def check_classifier(megalite: Megalite) -> None:
    """Settings that a classifier does not support."""
    if not megalite.data.classes:
        return
    with_classes = "with megalite.data.objective.classes"
    if megalite.parallel.context > 1:
        rule = f"must be 1 {with_classes}: the tokens of a text cannot be divided"
        raise broken("megalite.parallel.context", megalite.parallel.context, rule)
    if megalite.train.z_loss > 0:
        rule = f"must be 0 {with_classes}: it applies to a softmax over the vocabulary"
        raise broken("megalite.train.z_loss", megalite.train.z_loss, rule)


def check_objective(data: Data, dims: ModelDims) -> None:
    """The objective must fit the model's attention mask and its head."""
    if dims.labels != data.classes:
        rule = f'must have the labels of the model, a classifier: {{"classes": {json.dumps(dims.labels)}}}'
        value = data.objective if isinstance(data.objective, str) else data.objective.model_dump()
        raise broken("megalite.data.objective", value, rule)
    if data.classes or check_objective_of_stacks(data, dims):
        return
    if dims.causal and isinstance(data.objective, Masked):
        value = data.objective.model_dump(exclude_none=True)
        rule = f"needs an encoder, such as bert: a {dims.family} model sees only earlier tokens"
        raise broken("megalite.data.objective", value, rule)
    if not dims.causal and isinstance(data.objective, str):
        rule = f'must be {{"masked": 0.15}} or similar with a {dims.family} model, which sees all tokens'
        raise broken("megalite.data.objective", data.objective, rule)
