"""`launcher/generate.py`: from the command line to a JSON line for each text on standard output.

deepspeed --num_gpus 4 launcher/generate.py --checkpoint runs/x --prompt "Once" megalite.parallel.tensor=4
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from megalite.data.progress import Counted
from megalite.data.tokenizer import Tokenizer, continuation, prompt_ids
from megalite.errors import CheckpointError, ConfigError
from megalite.hub.sources import open_weights
from megalite.inference.prepare import (
    PreparedModel,
    beams_asked,
    check_decoder,
    from_rank_0,
    load_stage,
    model_parser,
    prepare_model,
    stop_ids_for,
    tokenizer_for,
)
from megalite.inference.texts import Growing, as_sources, check_ids
from megalite.inputs import lines_of, parse_json, read_standard_input, reading
from megalite.ranks.arguments import any_text, at_least
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.rank_info import rank_info

STANDARD_INPUT = "-"


def generate_main(arguments: list[str]) -> int:
    """Continues prompts and prints one JSON object per line with `prompt` and `text`, in the prompts' order. With
    several samples, those of a prompt follow one another, each with its number as `sample`."""
    options = _parser().parse_args(arguments)

    def prepare(thorough: bool) -> _Asked:
        with reading(options.checkpoint, CheckpointError):
            return _asked(options)

    here, asked = start_ranks(prepare)
    # Only rank 0 has standard input.
    prompts, ids = from_rank_0((asked.prompts, asked.ids))
    texts = _generate(asked, ids, options)
    if here.rank == 0:
        for number, prompt in enumerate(prompts):
            for sample, text in enumerate(texts[number :: len(prompts)]):
                numbered = {"sample": sample} if options.samples > 1 else {}
                line = {"prompt": prompt, **numbered, "text": text}
                print(json.dumps(line, ensure_ascii=False), flush=True)
    stop_ranks()
    return 0


class _Asked(NamedTuple):
    """The validated command line. prompts, ids: on rank 0. sampling: a Sampling. beams: Beams or None."""

    prepared: PreparedModel
    tokenizer: Tokenizer
    prompts: list[str]
    ids: list[list[int]]
    sampling: Any
    beams: Any


def _asked(options: argparse.Namespace) -> _Asked:
    from megalite.inference.sampling import Sampling

    prepared = prepare_model(options, rank_info().world_size)
    check_decoder(prepared.spec, f"--checkpoint: {prepared.folder}", "generation", sources=True)
    tokenizer = tokenizer_for(options, prepared)
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        options.repetition_penalty,
        options.min_p,
    )
    if options.samples > 1 and sampling.temperature == 0.0:
        rule = "needs --temperature above 0: with 0 all samples are equal"
        raise ConfigError(f"--samples: {options.samples}: {rule}")
    beams = beams_asked(options)
    if beams is not None:
        _check_beams(options)
    size = prepared.spec.vocabulary_size
    for stop_id in options.stop_id:
        if stop_id >= size:
            raise ConfigError(f"--stop-id: {stop_id}: must be below the model's vocab_size {size}")
    prompts = _prompts(options) if rank_info().rank == 0 else []
    if options.stream and len(prompts) * options.samples > 1:
        raise ConfigError("--stream: only with one prompt and one sample")
    ids = _encoded(prepared, tokenizer, prompts, options.max_new_tokens)
    return _Asked(prepared, tokenizer, prompts, ids, sampling, beams)


def _parser() -> argparse.ArgumentParser:
    parser = model_parser("Continue prompts on any layout of the pipe and tensor axes.")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        type=any_text,
        help="one prompt, which may contain newlines; - reads it from standard input",
    )
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line; for a .jsonl file the `prompt` of each line, which may contain newlines",
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=64, metavar="N", help="most tokens per text"
    )
    _add_sampling(parser)
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=8,
        help="prompts that go through the stages together",
    )
    parser.add_argument(
        "--stop-id",
        type=at_least(0),
        action="append",
        default=[],
        metavar="ID",
        help="token that ends a text",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text before which a text ends"
    )
    parser.add_argument(
        "--stream", action="store_true", help="print tokens to standard error as they are generated"
    )
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options for choosing tokens."""
    parser.add_argument(
        "--samples", type=at_least(1), default=1, metavar="N", help="texts per prompt"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k likeliest")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest with this probability"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="sample only from tokens at least this likely, as a share of the likeliest's probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: makes tokens that the text already contains less likely",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=1234, metavar="N", help="of random choices"
    )
    parser.add_argument("--beams", type=at_least(2), metavar="N", help="beam search with N beams")
    parser.add_argument("--length-penalty", type=float, help="for --beams (default: 1.0)")


def _check_beams(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not apply to beam search."""
    for option, is_given in (
        ("--temperature", options.temperature > 0),
        ("--repetition-penalty", options.repetition_penalty != 1.0),
        ("--stream", options.stream),
    ):
        if is_given:
            raise ConfigError(f"{option}: not with --beams")


def _generate(asked: _Asked, prompts: list[list[int]], options: argparse.Namespace) -> list[str]:
    """The texts of all prompts, on every rank: the first sample of each, then the second of each, …"""
    from megalite.inference.generate import Generator, cut_at, ends_at, generate_all

    # Random choices depend on a text's number; sample 0 is the same as without --samples.
    ids = prompts * options.samples
    prepared, tokenizer, beams = asked.prepared, asked.tokenizer, asked.beams
    stage, grid = load_stage(prepared, options.dtype)
    stop_ids = stop_ids_for(open_weights(prepared.folder), tokenizer) | set(options.stop_id)
    is_source = prepared.spec.stacks is not None

    def text_of(number: int, tokens: Sequence[int]) -> str:
        text = continuation(tokenizer, ids[number], tokens, stop_ids, is_source)
        return cut_at(text, options.stop)

    def show(piece: str) -> None:
        print(piece, end="", file=sys.stderr, flush=True)

    growing = Growing(functools.partial(text_of, 0), show)
    shown = options.stream and grid.rank == 0 and len(ids) == 1
    generator = Generator(stage, grid, options.batch_size, prepared.prefixed)
    ends = ends_at(tokenizer, options.stop)
    own = len(range(grid.data.rank, len(ids), grid.data.size))
    # Beam search only knows its tokens at the end, so progress would not move.
    visible = grid.rank == 0 and not shown and beams is None
    with Counted("new tokens at most", own * options.max_new_tokens, visible) as progress:
        on_token = growing.add if shown else lambda number, token: progress.add()
        found = generate_all(
            generator, ids, options.max_new_tokens, asked.sampling, stop_ids, ends, on_token, beams
        )
    texts = [text_of(number, tokens) for number, tokens in enumerate(found)]
    if shown:
        growing.end(texts[0])
        print(file=sys.stderr, flush=True)
    return texts


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt == STANDARD_INPUT:
        return [_standard_input()]
    if options.prompt is not None:
        return [options.prompt]
    if options.prompts is None:
        raise ConfigError("--prompt: missing: give it or --prompts FILE")
    lines = lines_of(options.prompts)
    if not lines:
        raise ConfigError(f"--prompts: {options.prompts}: must hold one prompt per line")
    if not options.prompts.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_prompt_of(line, f"{options.prompts}:{number}") for number, line in lines]


def _standard_input() -> str:
    text = read_standard_input("--prompt")
    if not text:
        raise ConfigError("--prompt: -: standard input is empty: must hold the prompt")
    return text


def _prompt_of(line: str, where: str) -> str:
    value = parse_json(line, where)
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where}: must be an object with a text as its "prompt"')
    return prompt


def _encoded(
    prepared: PreparedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    from megalite.inference.generate import check_lengths

    with reading("--prompt"):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        ids = as_sources(prepared.spec, tokenizer, ids)
    check_ids(prepared.spec, ids)
    check_lengths(prepared.spec, ids, max_new_tokens)
    return ids
