"""`launcher/generate.py`: from the command line to a JSON line for each prompt on standard output.

deepspeed --num_gpus 4 launcher/generate.py --checkpoint runs/x --prompt "Once" megalite.parallel.tensor=4
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from typing import Any

from megalite.data.progress import Counted
from megalite.data.tokenizer import Tokenizer, prompt_ids
from megalite.errors import CheckpointError, ConfigError
from megalite.inference.prepare import (
    Prepared,
    check_decoder,
    check_ids,
    load_stage,
    model_parser,
    prepare_model,
    stop_ids_for,
    tokenizer_for,
)
from megalite.inputs import read_text, reading
from megalite.ranks.launch import at_least, place, start_ranks, stop_ranks


def generate_main(arguments: list[str]) -> int:
    """Continues prompts; one JSON object a line with `prompt` and `text`, in the prompts' order."""
    parser = model_parser(
        "generate.py", "Continue prompts on any layout of the pipe and tensor axes."
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="one prompt")
    given.add_argument("--prompts", metavar="FILE", help="a prompt a line")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k likeliest")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest with this probability"
    )
    parser.add_argument("--seed", type=at_least(0), default=1234)
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=8,
        help="prompts that go through the stages together",
    )
    parser.add_argument(
        "--stop-id", type=at_least(0), action="append", default=[], metavar="ID", help="ends a text"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a text before it"
    )
    parser.add_argument(
        "--stream", action="store_true", help="show tokens on standard error as they come"
    )
    options = parser.parse_args(arguments)
    from megalite.inference.sampling import Sampling

    def prepare(thorough: bool) -> tuple[Prepared, Tokenizer, list[str], list[list[int]], Any]:
        with reading(options.checkpoint, CheckpointError):
            prepared = prepare_model(options, place().world_size)
            check_decoder(prepared, "generation")
            tokenizer, prompts = tokenizer_for(options, prepared), _prompts(options)
            sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
            ids = _encoded(prepared, tokenizer, prompts, options.max_new_tokens)
        return prepared, tokenizer, prompts, ids, sampling

    here, (prepared, tokenizer, prompts, ids, sampling) = start_ranks(prepare)
    try:
        texts = _generate(prepared, tokenizer, ids, sampling, options)
        if here.rank == 0:
            for prompt, text in zip(prompts, texts, strict=True):
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
    finally:
        stop_ranks()
    return 0


def _generate(
    prepared: Prepared,
    tokenizer: Tokenizer,
    ids: list[list[int]],
    sampling: Any,
    options: argparse.Namespace,
) -> list[str]:
    """The texts of all prompts, on every rank."""
    from megalite.inference.generate import Generator, cut_at, ends_at, generate_all

    stage, grid = load_stage(prepared, options.dtype)
    stop_ids = stop_ids_for(prepared, tokenizer) | set(options.stop_id)

    def text_of(number: int, tokens: Sequence[int]) -> str:
        return cut_at(_continuation(tokenizer, ids[number], tokens, stop_ids), options.stop)

    told: list[int] = []
    written: list[str] = []

    def show(number: int, token: int) -> None:
        told.append(token)
        text = text_of(number, told)
        if not text.endswith("\ufffd"):  # else a character is not whole yet
            print(text[len("".join(written)) :], end="", file=sys.stderr, flush=True)
            written[:] = [text]

    shown = options.stream and grid.rank == 0 and len(ids) == 1
    generator = Generator(stage, grid, options.batch_size)
    ends = ends_at(tokenizer, options.stop)
    own = len(range(grid.data.rank, len(ids), grid.data.size))
    visible = grid.rank == 0 and not shown
    with Counted("new tokens at most", own * options.max_new_tokens, visible) as progress:
        on_token = show if shown else lambda number, token: progress.add()
        found = generate_all(
            generator, ids, options.max_new_tokens, sampling, stop_ids, ends, on_token
        )
    if shown:
        print(file=sys.stderr, flush=True)
    return [text_of(number, tokens) for number, tokens in enumerate(found)]


def _continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Collection[int] = ()
) -> str:
    """The text that tokens add to a prompt's: decoded together, since a token's text depends on its neighbours."""
    kept = [token for token in tokens if token not in stop]
    start, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *kept])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(kept)


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        return [options.prompt]
    if options.prompts is None:
        raise ConfigError("--prompt: missing: give it or --prompts FILE")
    lines = read_text(options.prompts).splitlines()
    if not any(lines):
        raise ConfigError(f"--prompts: {options.prompts}: must hold a prompt a line")
    return [line for line in lines if line]


def _encoded(
    prepared: Prepared, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    from megalite.inference.generate import check_lengths

    with reading("--prompt"):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    check_ids(prepared, ids)
    check_lengths(prepared.spec, ids, max_new_tokens)
    return ids
