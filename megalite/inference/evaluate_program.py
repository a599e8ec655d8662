"""`launcher/evaluate.py`: from the command line to JSON lines on standard output. It measures one of

--data PREFIX       the loss on an indexed corpus; for a text classifier also its accuracy
--labelled FILE     the accuracy of a classification
--translations FILE  chrF and BLEU of the translations of pairs
--tasks NAMES       tasks of lm-evaluation-harness
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from typing import Any

from megalite.config import Data
from megalite.config.context_rules import check_context_length
from megalite.config.data_rules import check_data_keys, check_objective, check_undivided
from megalite.config.masks import Masked
from megalite.config.section import broken, nearest, parse, unknown
from megalite.data.chat_encoder import ChatEncoder
from megalite.data.indexed import files_of
from megalite.data.loader import ValidData, marks_prefix
from megalite.data.pairs import TEMPLATE, PairEncoder
from megalite.data.tokenizer import HuggingFaceTokenizer
from megalite.errors import CheckpointError, ConfigError
from megalite.hub.carried import tokenizer_of
from megalite.hub.sources import open_weights
from megalite.inference.prepare import (
    PreparedModel,
    beams_asked,
    check_decoder,
    load_stage,
    model_parser,
    prepare_model,
    stop_ids_for,
    tokenizer_for,
)
from megalite.inference.texts import as_sources, check_ids
from megalite.inputs import reading
from megalite.ranks.arguments import at_least
from megalite.ranks.launch import start_ranks, stop_ranks
from megalite.ranks.rank_info import rank_info
from megalite.training.classification import figures
from megalite.training.metrics import perplexity

FOLLOWED = ("samples", "loss", "objective", "reset_attention", "eod_mask_loss")
"""Keys of `megalite.data` whose default is the value of the model's training run."""
MASKED = 0.15  # share of masked tokens, if an encoder's weights do not say how they were trained
_GIVEN = ("sequence_length", "tokenizer", *FOLLOWED)

OWNERS = {
    "template": "translations",
    "max_new_tokens": "translations",
    "beams": "translations",
    "length_penalty": "translations",
    "write": "translations",
    "include_path": "tasks",
    "num_fewshot": "tasks",
    "limit": "tasks",
    "apply_chat_template": "tasks",
}
"""Options that are only for one kind of measurement; None or False if they are not given."""
MOST_NEW_TOKENS = 128  # default, per translation

Work = Callable[[Any, Any], list[dict[str, Any]]]
"""Takes this rank's stage and the grid; returns the objects that rank 0 prints."""


def evaluate_main(arguments: list[str]) -> int:
    """Scores a model and prints JSON lines: for a corpus `loss` (mean over tokens, in nats), `perplexity`, `tokens`,
    and for a text classifier the figures of training/classification.py."""
    options = _parser().parse_args(arguments)
    kinds = (
        (options.data, _corpus),
        (options.labelled, _labels),
        (options.translations, _translations),
    )
    prepare_work = next((work for asked, work in kinds if asked), _tasks)

    def prepare(thorough: bool) -> tuple[PreparedModel, Work]:
        _check_owners(options)
        with reading(options.checkpoint, CheckpointError):
            sections, whole = (("data",), True) if options.data else ((), False)
            prepared = prepare_model(options, rank_info().world_size, sections, whole)
            return prepared, prepare_work(options, prepared, thorough)

    here, (prepared, work) = start_ranks(prepare)
    for line in work(*load_stage(prepared, options.dtype)):
        if here.rank == 0:
            print(json.dumps(line, ensure_ascii=False), flush=True)
    stop_ranks()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = model_parser("Score a model on any layout.")
    _add_kinds(parser.add_mutually_exclusive_group(required=True))
    _add_owned(parser)
    parser.add_argument(
        "--sequence-length",
        type=at_least(1),
        help="tokens per row (default: the run's, else the model's)",
    )
    parser.add_argument(
        "--micro-batch-size",
        type=at_least(1),
        default=8,
        help="rows that go through the stages together (default: 8)",
    )
    return parser


def _add_kinds(what: Any) -> None:
    """Adds the kinds of measurement to a mutually exclusive group."""
    what.add_argument(
        "--data", metavar="PREFIX", help="a corpus, PREFIX.bin and PREFIX.idx: loss and perplexity"
    )
    what.add_argument(
        "--labelled", metavar="FILE", help="lines with prompt and completion (the label): accuracy"
    )
    what.add_argument(
        "--tasks",
        metavar="NAMES",
        help="comma-separated tasks of lm-evaluation-harness: its metrics",
    )
    what.add_argument(
        "--translations", metavar="FILE", help="lines with source and target: chrF and BLEU"
    )


def _add_owned(parser: argparse.ArgumentParser) -> None:
    """Adds the options of OWNERS."""
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help=f"the text before a translation, as in training (default: {TEMPLATE!r})",
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), help=f"per translation ({MOST_NEW_TOKENS})"
    )
    parser.add_argument(
        "--beams", type=at_least(2), metavar="N", help="beam search for --translations"
    )
    parser.add_argument("--length-penalty", type=float, help="for --beams (default: 1.0)")
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="write the translations: lines with source, target, translation",
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="YAML files of further tasks")
    parser.add_argument(
        "--num-fewshot",
        type=at_least(0),
        metavar="N",
        help="examples before each question of --tasks",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="only the first N questions of each of --tasks",
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="for the questions of --tasks"
    )


def _check_owners(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that is not for this kind of measurement."""
    for name, owner in OWNERS.items():
        value = getattr(options, name)
        if value is not None and value is not False and getattr(options, owner) is None:
            raise ConfigError(f"--{name.replace('_', '-')}: only with --{owner}")


def _corpus(options: argparse.Namespace, prepared: PreparedModel, thorough: bool) -> Work:
    data = _data(options, prepared)
    length, context = data.sequence_length, prepared.parallel.context
    check_context_length(prepared.parallel, length)
    check_undivided(prepared.parallel, data)
    if context > 1 and prepared.spec.classifier is not None:
        rule = "must be 1 for a classifier: the tokens of a text are not divided"
        raise broken("megalite.parallel.context", context, rule)
    samples = ValidData(data, prepared.spec.vocabulary_size, check=thorough)
    by_heads = prepared.parallel.context_attention == "heads"
    labels = prepared.spec.labels

    def work(stage: Any, grid: Any) -> list[dict[str, Any]]:
        from megalite.inference.evaluate import evaluate

        score = evaluate(
            stage,
            grid,
            samples,
            samples.num_samples,
            length,
            options.micro_batch_size,
            by_heads,
            data.source_length,
        )
        settings = data.model_dump(include={"sequence_length", *FOLLOWED}, exclude_none=True)
        line = {
            "loss": score.loss,
            "perplexity": perplexity(score.loss),
            "tokens": score.tokens,
            **(figures(score.counts, labels) if labels else {}),
            "data": settings,
        }
        return [line]

    return work


def _data(options: argparse.Namespace, prepared: PreparedModel) -> Data:
    """How the corpus is read: from the command line, else as in the checkpoint's training run."""
    given, trained = prepared.sections.get("data", {}), prepared.state.get("data", {})
    for key in given.keys() - set(_GIVEN):
        names = [f"megalite.data.{name}" for name in _GIVEN]
        raise unknown(f"megalite.data.{key}", nearest(f"megalite.data.{key}", names))
    keys = {key: trained[key] for key in FOLLOWED if key in trained}
    if not files_of(marks_prefix(options.data))[0].exists():
        keys["loss"] = "all"  # the corpus has no marks, whatever the run's had
        if prepared.prefixed:
            keys["objective"] = "causal"  # nor prompts
    if labels := prepared.spec.labels:
        keys.setdefault("objective", {"classes": list(labels)})
        keys.setdefault("samples", "padded")
        keys.setdefault("reset_attention", True)
    elif not prepared.spec.causal:
        keys.setdefault("objective", {"masked": MASKED})
    keys |= {"sequence_length": _sequence_length(options, prepared, given), "train": [options.data]}
    data = parse(Data, {**keys, "valid": [options.data], **given}, "megalite.data")
    needs_tokenizer = data.eod_mask_loss or isinstance(data.objective, Masked)
    if needs_tokenizer and data.tokenizer is None:
        folder = options.tokenizer or tokenizer_of(open_weights(prepared.folder))
        data = data.model_copy(update={"tokenizer": folder and str(folder)})
    check_data_keys(data)
    check_objective(data, prepared.spec)
    return data


def _sequence_length(
    options: argparse.Namespace, prepared: PreparedModel, given: dict[str, Any]
) -> int:
    for length in (
        given.get("sequence_length"),
        options.sequence_length,
        prepared.state.get("sequence_length"),
    ):
        if length is not None:
            return length
    length = prepared.spec.max_positions
    if length is None:
        raise ConfigError(
            "--sequence-length: missing: neither the checkpoint nor the model's config has one"
        )
    return length


def _labels(options: argparse.Namespace, prepared: PreparedModel, thorough: bool) -> Work:
    from megalite.inference.labels import accuracy, read_labelled

    check_decoder(prepared.spec, f"--checkpoint: {prepared.folder}", "--labelled")
    tokenizer = tokenizer_for(options, prepared)
    length = _sequence_length(options, prepared, {})
    encoder = ChatEncoder(tokenizer, str(options.tokenizer or options.checkpoint))
    labelled = read_labelled(options.labelled, encoder, length + 1)
    check_ids(prepared.spec, (ids for ids, _ in labelled.rows))

    def work(stage: Any, grid: Any) -> list[dict[str, Any]]:
        from megalite.inference.likelihood import likelihoods

        size, prefixed = options.micro_batch_size, prepared.prefixed
        return [accuracy(labelled, likelihoods(stage, grid, labelled.rows, size, prefixed))]

    return work


def _translations(options: argparse.Namespace, prepared: PreparedModel, thorough: bool) -> Work:
    from megalite.inference.generate import check_lengths
    from megalite.inference.translations import (
        check_writable,
        read_pairs,
        scores,
        write_translations,
    )

    check_decoder(prepared.spec, f"--checkpoint: {prepared.folder}", "--translations", sources=True)
    if importlib.util.find_spec("sacrebleu") is None:
        line = f"--translations: {options.translations}: needs sacrebleu"
        raise ConfigError(f"{line}: pip install 'megalite[eval]'")
    tokenizer = tokenizer_for(options, prepared)
    template = TEMPLATE if options.template is None else options.template
    encoder = PairEncoder.of(tokenizer, str(options.tokenizer or options.checkpoint), template)
    if options.write is not None:
        check_writable(options.write)
    pairs = read_pairs(options.translations)
    prompts = encoder.prompts([source for source, _ in pairs])
    prompts = as_sources(prepared.spec, tokenizer, prompts)
    check_ids(prepared.spec, prompts)
    most = options.max_new_tokens or MOST_NEW_TOKENS
    check_lengths(prepared.spec, prompts, most)
    beams = beams_asked(options)
    stop_ids = stop_ids_for(open_weights(prepared.folder), tokenizer)

    def work(stage: Any, grid: Any) -> list[dict[str, Any]]:
        from megalite.inference.generate import Generator, ends_at, generate_all
        from megalite.inference.sampling import Sampling

        generator = Generator(stage, grid, options.micro_batch_size, prepared.prefixed)
        ends = ends_at(tokenizer, ())
        found = generate_all(generator, prompts, most, Sampling(), stop_ids, ends, beams=beams)
        if grid.rank != 0:
            return []
        # The token that ends a text is not part of it.
        kept = [[token for token in tokens if token not in stop_ids] for tokens in found]
        texts = [tokenizer.decode(tokens).strip() for tokens in kept]
        if options.write is not None:
            write_translations(options.write, pairs, texts)
        cut = sum(len(tokens) == most and tokens[-1] not in stop_ids for tokens in found)
        line = scores(texts, [target for _, target in pairs])
        return [line | {"lines": len(pairs), "cut": cut, "beams": options.beams or 1}]

    return work


def _tasks(options: argparse.Namespace, prepared: PreparedModel, thorough: bool) -> Work:
    check_decoder(prepared.spec, f"--checkpoint: {prepared.folder}", "--tasks")
    tokenizer = tokenizer_for(options, prepared)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(
            f"--tokenizer: {options.tokenizer}: must be a Hugging Face tokenizer for --tasks"
        )
    names = options.tasks.split(",")
    stop_ids = stop_ids_for(open_weights(prepared.folder), tokenizer)
    length = options.sequence_length or prepared.spec.max_positions
    is_asking = rank_info().rank == 0
    if is_asking:
        try:
            from megalite.inference import harness
        except ImportError as error:
            line = f"--tasks: {options.tasks}: needs lm-eval: pip install 'megalite[eval]'"
            raise ConfigError(f"{line}: {error}") from error
        with reading(f"--tasks: {options.tasks}"):
            tasks = harness.load_tasks(names, options.include_path)

    def work(stage: Any, grid: Any) -> list[dict[str, Any]]:
        from megalite.inference.answers import Answers

        size, prefixed = options.micro_batch_size, prepared.prefixed
        answers = Answers(stage, grid, tokenizer, stop_ids, size, prefixed)
        if not is_asking:
            answers.take_part()
            return []
        try:
            model = harness.Harness(answers, tokenizer.inner, length)
            return harness.run(
                model, tasks, options.num_fewshot, options.limit, options.apply_chat_template
            )
        finally:
            answers.end()

    return work
