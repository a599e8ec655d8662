"""`launcher/generate.py` and `launcher/evaluate.py`: from the command line to JSON lines on standard output.

    deepspeed --num_gpus 4 launcher/generate.py --checkpoint runs/x --prompt "Once" megalite.parallel.tensor=4
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config import Data, Parallel
from megalite.config.reading import apply_overrides
from megalite.config.rules import check_layout, data_axis_size
from megalite.config.section import parse, unknown
from megalite.convert.carried import stop_ids_of, tokenizer_of
from megalite.convert.weights import open_weights, open_weights_together, resolve_weights
from megalite.data.loader import ValidData
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalite.errors import ConfigError
from megalite.launch import ArgumentParser, place, start_ranks, stop_ranks
from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec

DTYPES = ("float32", "bfloat16")


@dataclass
class Prepared:
    """What the ranks need. folder: of the weights; model: the Hugging Face config as a dict."""

    folder: Path
    model: dict[str, Any]
    spec: TransformerSpec
    parallel: Parallel
    tokenizer: Tokenizer | None = None
    stop_ids: frozenset[int] = frozenset()


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = ArgumentParser(name, description=about)
    parser.add_argument("--checkpoint", required=True, help="a run folder, a checkpoint or a Hugging Face folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="megalite.parallel.tensor=N, ….pipe=N")
    return parser


def _prepare(options: argparse.Namespace, world_size: int) -> Prepared:
    """Checks what was asked for against weights and world, without a rank."""
    folder = resolve_weights(options.checkpoint)
    weights = open_weights(folder)
    spec = read_spec(weights.model)
    document = apply_overrides({"megalite": {"parallel": {}}}, options.overrides)
    for key in document.keys() - {"megalite"}:
        raise unknown(key, ["megalite.parallel"])
    for key in document["megalite"].keys() - {"parallel"}:
        raise unknown(f"megalite.{key}", ["megalite.parallel"])
    parallel = parse(Parallel, document["megalite"]["parallel"], "megalite.parallel")
    data_axis_size(parallel, world_size)
    check_layout(parallel.tensor, parallel.pipe, spec)
    return Prepared(folder, weights.model, spec, parallel)


def _loaded(prepared: Prepared, dtype: str) -> tuple[Any, Any]:
    """This rank's stage with its weights, and the grid."""
    # Imported here: a mistake on the command line is told before torch's half of the start.
    import torch
    from deepspeed.accelerator import get_accelerator

    from megalite.checkpoint.weights import load_module
    from megalite.model.transformer import Stage
    from megalite.parallel.grid import Grid

    grid = Grid.build(prepared.parallel.pipe, prepared.parallel.tensor)
    stage = Stage(prepared.spec, grid)
    load_module(open_weights_together(prepared.folder).read, stage)
    accelerator: Any = get_accelerator()
    return stage.to(device=accelerator.current_device_name(), dtype=getattr(torch, dtype)), grid


def generate_main(arguments: list[str]) -> int:
    """Continues prompts; one JSON object a line with `prompt` and `text`, in the prompts' order."""
    parser = _parser("generate.py", "Continue prompts on any layout of the pipe and tensor axes.")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", help="one prompt")
    given.add_argument("--prompts", metavar="FILE", help="a prompt a line")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the checkpoint does not say")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest with this probability")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts that go through the stages together")
    parser.add_argument("--stop-id", type=int, action="append", default=[], metavar="ID", help="ends a text, too")
    parser.add_argument("--stream", action="store_true", help="show tokens on standard error as they come")
    options = parser.parse_args(arguments)
    from megalite.inference.sampling import Sampling

    def prepare(thorough: bool) -> tuple[Prepared, list[str], list[list[int]], Any]:
        prepared = _prepare(options, place().world_size)
        prepared.tokenizer = _tokenizer(options, prepared)
        prepared.stop_ids = _stop_ids(options, prepared)
        prompts = _prompts(options)
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        return prepared, prompts, _encoded(prepared, prompts, options.max_new_tokens), sampling

    here, (prepared, prompts, ids, sampling) = start_ranks(prepare)
    try:
        texts = _generate(prepared, ids, sampling, options)
        if here.rank == 0:
            for prompt, text in zip(prompts, texts, strict=True):
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
    finally:
        stop_ranks()
    return 0


def _generate(prepared: Prepared, ids: list[list[int]], sampling: Any, options: argparse.Namespace) -> list[str]:
    """The texts of all prompts, on every rank: the data axis shares them out."""
    import torch.distributed as dist

    from megalite.inference.generate import Generator

    tokenizer = prepared.tokenizer
    assert tokenizer is not None
    stage, grid = _loaded(prepared, options.dtype)
    own = list(range(grid.data.rank, len(ids), grid.data.size))
    stop = prepared.stop_ids
    shown = options.stream and grid.rank == 0 and len(ids) == 1
    told: list[int] = []
    written: list[str] = []

    def show(number: int, token: int) -> None:
        told.append(token)
        text = _continuation(tokenizer, ids[number], told, stop)
        if not text.endswith("\ufffd"):  # else a character is not whole yet
            print(text[len("".join(written)) :], end="", file=sys.stderr, flush=True)
            written[:] = [text]

    found = Generator(stage, grid, options.batch_size).generate(
        [ids[number] for number in own], options.max_new_tokens, sampling, stop, show if shown else None, own
    )
    everyone: list[Any] = [None] * grid.world_size
    dist.all_gather_object(everyone, {text.number: text.tokens for text in found})
    tokens = {number: some for part in everyone for number, some in part.items()}
    return [_continuation(tokenizer, prompt, tokens[number], stop) for number, prompt in enumerate(ids)]


def _continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Collection[int] = ()
) -> str:
    """The text that tokens add to a prompt's: decoded together, since a token's text hangs on its neighbours."""
    kept = [token for token in tokens if token not in stop]
    start, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *kept])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(kept)


def _tokenizer(options: argparse.Namespace, prepared: Prepared) -> Tokenizer:
    folder = options.tokenizer or tokenizer_of(open_weights(prepared.folder))
    if folder is None:
        raise ConfigError(f"--tokenizer: missing: {prepared.folder} does not say which tokenizer it was trained with")
    return load_tokenizer(folder)


def _stop_ids(options: argparse.Namespace, prepared: Prepared) -> frozenset[int]:
    """What ends a text: the tokenizer's end of document, generation_config.json, the command line."""
    ends = stop_ids_of(open_weights(prepared.folder)) | set(options.stop_id)
    eod_id = prepared.tokenizer.eod_id if prepared.tokenizer is not None else None
    return frozenset(ends if eod_id is None else ends | {eod_id})


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        return [options.prompt]
    if options.prompts is None:
        raise ConfigError("--prompt: missing: give it or --prompts FILE")
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {options.prompts}: cannot be read: {error}") from error
    if not any(lines):
        raise ConfigError(f"--prompts: {options.prompts}: must hold a prompt a line")
    return [line for line in lines if line]


def _encoded(prepared: Prepared, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    from megalite.inference.generate import check_lengths

    tokenizer = prepared.tokenizer
    assert tokenizer is not None
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    highest = max((max(some) for some in ids if some), default=0)
    if highest >= prepared.spec.vocabulary_size:
        raise ConfigError(
            f"--tokenizer: gives id {highest}: must be below the model's vocab_size {prepared.spec.vocabulary_size}"
        )
    check_lengths(prepared.spec, ids, max_new_tokens)
    return ids


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt as transformers gives them to a model: with the token that the tokenizer puts before a
    text, where it puts one."""
    ids = tokenizer.encode(prompt)
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.bos_id is not None:
        first = tokenizer.inner(prompt)["input_ids"][:1]
        if first == [tokenizer.bos_id] and ids[:1] != first:
            return first + ids
    return ids


def evaluate_main(arguments: list[str]) -> int:
    """Scores a corpus; one JSON line with `loss` (mean over tokens, in nats), `perplexity`, `tokens`."""
    parser = _parser("evaluate.py", "The loss of a model on an indexed corpus, on any layout.")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--sequence-length", type=int, help="tokens of a window; default: the run's, else the model's")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="windows that go through the stages together")
    options = parser.parse_args(arguments)

    def prepare(thorough: bool) -> tuple[Prepared, ValidData, int]:
        prepared = _prepare(options, place().world_size)
        length = _sequence_length(options, prepared)
        keys = {"sequence_length": length, "train": [options.data], "valid": [options.data]}
        data = parse(Data, keys, "megalite.data")
        samples = ValidData(data, prepared.spec.vocabulary_size, check=thorough)
        if samples.num_samples == 0:
            raise ConfigError(f"--data: {options.data}: holds no window of {length} + 1 tokens: must hold one or more")
        return prepared, samples, length

    here, (prepared, samples, length) = start_ranks(prepare)
    try:
        from megalite.inference.evaluate import evaluate

        stage, grid = _loaded(prepared, options.dtype)
        score = evaluate(stage, grid, samples, samples.num_samples, length, options.micro_batch_size)
        if here.rank == 0:
            print(json.dumps({"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}), flush=True)
    finally:
        stop_ranks()
    return 0


def _sequence_length(options: argparse.Namespace, prepared: Prepared) -> int:
    if options.sequence_length is not None:
        return options.sequence_length
    trained = getattr(open_weights(prepared.folder), "state", {}).get("sequence_length")
    length = trained or prepared.spec.max_positions
    if length is None:
        raise ConfigError("--sequence-length: missing: neither the checkpoint nor the model's config says one")
    return length
