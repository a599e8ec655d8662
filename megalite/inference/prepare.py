"""What `launcher/generate.py` and `launcher/evaluate.py` share: the arguments that name a model and a layout, their
checks, and this rank's stage with its weights. Next: generate_program.py, evaluate_program.py.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.files import best_checkpoint
from megalite.config import Parallel
from megalite.config.context_rules import check_context_keys
from megalite.config.reading import apply_overrides
from megalite.config.rules import check_layout, data_axis_size
from megalite.config.section import nearest, parse, unknown
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError
from megalite.hub.carried import stop_ids_of, tokenizer_of
from megalite.hub.sources import (
    Weights,
    open_weights,
    open_weights_together,
    prompts_both_ways,
    resolve_weights,
)
from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec
from megalite.ranks.arguments import ArgumentParser

DTYPES = ("float32", "bfloat16", "float16")
BEST_HELP = "take a run folder's checkpoint with the lowest validation loss (megalite.train.keep_best), not the newest"
AXES = {"pipe", "tensor"}  # keys of megalite.parallel that apply to a forward pass
CONTEXT = {"context", "context_attention"}  # and those for samples of equal length


@dataclass
class PreparedModel:
    """What the ranks need. folder: of the weights. model: the Hugging Face config as a dict. state: of the checkpoint,
    or the part of it that a Hugging Face folder has. sections: overrides of sections other than `parallel`, not
    validated yet."""

    folder: Path
    model: dict[str, Any]
    spec: TransformerSpec
    parallel: Parallel
    state: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def prefixed(self) -> bool:
        """Whether attention within a prompt is bidirectional, as in training."""
        return prompts_both_ways(self.state)


def model_parser(about: str) -> argparse.ArgumentParser:
    """A parser with the arguments of both programs."""
    parser = ArgumentParser(description=about)
    parser.add_argument(
        "--checkpoint", required=True, help="a run folder, a checkpoint or a Hugging Face folder"
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of weights and activations"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="needed if the checkpoint does not name one"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="megalite.parallel.tensor=N, ….pipe=N"
    )
    return parser


def prepare_model(
    options: argparse.Namespace,
    world_size: int,
    sections: tuple[str, ...] = (),
    whole_samples: bool = False,
) -> PreparedModel:
    """Validates the arguments against weights and world, without starting ranks. sections: of `megalite` that overrides
    may name besides `parallel`. whole_samples: whether the context axis may be used."""
    path = best_checkpoint(options.checkpoint) if options.best else options.checkpoint
    folder = resolve_weights(path)
    weights = open_weights(folder)
    spec = read_spec(weights.model)
    document = apply_overrides({"megalite": {"parallel": {}}}, options.overrides)
    allowed = [f"megalite.{name}" for name in ("parallel", *sections)]
    for key in document.keys() - {"megalite"}:
        raise unknown(key, allowed)
    for key in document["megalite"].keys() - {"parallel", *sections}:
        raise unknown(f"megalite.{key}", nearest(f"megalite.{key}", allowed))
    axes = document["megalite"].pop("parallel")
    taken = AXES | CONTEXT if whole_samples else AXES
    for key in axes.keys() & (Parallel.model_fields.keys() - taken):
        use = "training and evaluate.py --data" if key in CONTEXT else "training"
        raise ConfigError(
            f"megalite.parallel.{key}: {axes[key]}: is for {use}; must be left out here"
        )
    parallel = parse(Parallel, axes, "megalite.parallel")
    check_context_keys(parallel)
    data_axis_size(parallel, world_size)
    check_layout(parallel, spec)
    return PreparedModel(folder, weights.model, spec, parallel, weights.state, document["megalite"])


def check_decoder(spec: TransformerSpec, where: str, use: str, sources: bool = False) -> None:
    """Raises ConfigError if the model is an encoder or a classifier and `use` needs a causal language model. where,
    use: the model and the use, as text. sources: whether an encoder-decoder, whose prompts are sources, is allowed
    too."""
    if spec.stacks is not None and not sources:
        model = f"a {spec.family} model is an encoder-decoder"
        raise ConfigError(f"{where}: {model}: {use} needs a decoder, such as llama")
    if spec.classifier is not None:
        raise ConfigError(f"{where}: is a classifier of texts: {use} needs a language model")
    if not spec.causal:
        model = f"a {spec.family} model is an encoder"
        raise ConfigError(f"{where}: {model}: {use} needs a decoder, such as llama")


def load_stage(prepared: PreparedModel, dtype: str) -> tuple[Any, Any]:
    """This rank's stage with its weights, and the grid (collective)."""
    # Imported here, so that a mistake on the command line is reported before torch is loaded.
    import torch
    from deepspeed.accelerator import get_accelerator

    from megalite.checkpoint.saved_bias import set_router_bias
    from megalite.checkpoint.weights import load_onto
    from megalite.model.transformer import Stage
    from megalite.parallel.grid import Grid
    from megalite.pipeline.pipeline_plan import inference_cut

    parallel = prepared.parallel
    heads = prepared.spec.num_kv_heads
    grid = Grid.build(parallel.pipe, parallel.tensor, parallel.context, key_heads=heads)
    with torch.device("meta"):
        stage = Stage(prepared.spec, grid, inference_cut(prepared.spec, grid.pipe.size))
    accelerator: Any = get_accelerator()
    device = torch.device(accelerator.current_device_name())
    weights = open_weights_together(prepared.folder)
    load_onto(weights.read, stage, getattr(torch, dtype), device)
    set_router_bias(stage, prepared.state, device)
    return stage, grid


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank (collective)."""
    import torch.distributed as dist

    message = [value]
    dist.broadcast_object_list(message)
    return message[0]


def tokenizer_for(options: argparse.Namespace, prepared: PreparedModel) -> Tokenizer:
    """The tokenizer named on the command line, or the one of the weights. Raises ConfigError if there is neither."""
    folder = options.tokenizer or tokenizer_of(open_weights(prepared.folder))
    if folder is None:
        raise ConfigError(
            f"--tokenizer: missing: {prepared.folder} does not say which tokenizer it was trained with"
        )
    return load_tokenizer(folder)


def beams_asked(options: argparse.Namespace) -> Any:
    """The `Beams` of --beams and --length-penalty; None without --beams."""
    from megalite.inference.beams import Beams

    if options.beams is None:
        if options.length_penalty is not None:
            raise ConfigError(f"--length-penalty: {options.length_penalty}: only with --beams")
        return None
    penalty = 1.0 if options.length_penalty is None else options.length_penalty
    return Beams(options.beams, penalty)


def stop_ids_for(weights: Weights, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's end of document, and those of generation_config.json."""
    ends = stop_ids_of(weights)
    return frozenset(ends if tokenizer.eod_id is None else ends | {tokenizer.eod_id})
