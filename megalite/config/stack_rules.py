"""The rules of encoder-decoders: their objectives, and the layouts that they support.

Each raises ConfigError with one line. Called by rules.py and data_rules.py.
"""

from megalite.config.document import ModelDims
from megalite.config.objectives import Pairs, Spans
from megalite.config.parallel_keys import Parallel
from megalite.config.section import broken
from megalite.config.sections import Data, Megalite
from megalite.errors import ConfigError

PATH = "megalite.data.objective"


def check_source_target(data: Data) -> None:
    """The settings that an objective with source and target requires."""
    objective, length = data.objective, data.sequence_length
    if isinstance(objective, Pairs):
        with_pairs = f"with {PATH}.source_length"
        wanted = {"samples": "padded", "loss": "marked", "reset_attention": True}
        if objective.source_length >= length:
            rule = (
                f"must be below megalite.data.sequence_length {length}, which includes the target"
            )
            raise broken(f"{PATH}.source_length", objective.source_length, rule)
    elif isinstance(objective, Spans):
        with_pairs = f"with {PATH}.span_corruption"
        wanted = {"samples": "windows", "reset_attention": False}
        if data.loss == "marked":
            raise broken("megalite.data.loss", data.loss, f'must be "all" {with_pairs}')
        if data.spans is None:
            rule = f"is too short for a span {with_pairs} {objective.span_corruption}"
            raise broken("megalite.data.sequence_length", length, rule)
        for name, what in (("end_token_id", "an end"), ("sentinel_token_ids", "sentinels")):
            if data.tokenizer is None and getattr(objective, name) is None:
                rule = f"missing: give it or megalite.data.tokenizer, which has {what}"
                raise ConfigError(f"{PATH}.{name}: {rule}")
    else:
        return
    for name, only in {"order": "shuffled", "eod_mask_loss": False, **wanted}.items():
        if getattr(data, name) != only:
            shown = f'"{only}"' if isinstance(only, str) else str(only).lower()
            raise broken(
                f"megalite.data.{name}", getattr(data, name), f"must be {shown} {with_pairs}"
            )


def check_objective_of_stacks(data: Data, dims: ModelDims) -> bool:
    """Whether both the model and the objective are for encoder-decoders. Raises ConfigError if only one of them is."""
    objective = data.objective
    if not isinstance(objective, Pairs | Spans):
        if dims.start_id is None:
            return False
        rule = f'must be {{"source_length": 64}} or {{"span_corruption": 0.15}} or similar with a {dims.family} model'
        value = objective if isinstance(objective, str) else objective.model_dump(exclude_none=True)
        raise broken(PATH, value, rule)
    if dims.start_id is None:
        rule = f"needs an encoder-decoder, such as t5: a {dims.family} model has no source"
        raise broken(PATH, objective.model_dump(exclude_none=True), rule)
    if objective.start_token_id != dims.start_id:
        rule = f"must be the model's decoder_start_token_id {dims.start_id}"
        raise broken(f"{PATH}.start_token_id", objective.start_token_id, rule)
    return True


def check_layout_of_stacks(parallel: Parallel, dims: ModelDims) -> None:
    """Context and sequence parallelism divide the tokens of one stack only."""
    if dims.start_id is None:
        return
    model = f"with a {dims.family} model: the tokens of source and target cannot be divided"
    if parallel.context > 1:
        raise broken("megalite.parallel.context", parallel.context, f"must be 1 {model}")
    if parallel.sequence:
        raise broken("megalite.parallel.sequence", True, f"must be false {model}")


def check_stacks(megalite: Megalite, dims: ModelDims) -> None:
    """Training settings that encoder-decoders do not support."""
    if dims.start_id is not None and megalite.train.sample_prompts:
        rule = f"must be left out with a {dims.family} model: use launcher/generate.py"
        raise broken("megalite.train.sample_prompts", megalite.train.sample_prompts, rule)
