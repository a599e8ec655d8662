"""Tokenize text files into a corpus: PREFIX.bin and PREFIX.idx in Megatron's indexed format.

After a stop, run the same command again: it resumes.
"""

import argparse
import sys

from megalite.data.pairs import TEMPLATE
from megalite.data.preprocessing import preprocess
from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, at_least


def _add_forms(parser: argparse.ArgumentParser) -> None:
    """The options for inputs that hold more than texts."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="lines hold conversations: `messages`, `prompt` and `completion`, ShareGPT's `conversations` or Alpaca's "
        "`instruction` and `output`; PREFIX.mask marks the assistant's tokens",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="lines hold `source` and `target`, a text and its translation; PREFIX.mask marks the translations",
    )
    parser.add_argument(
        "--template",
        metavar="TEXT",
        help=f"the text before a translation of --pairs (default: {TEMPLATE!r})",
    )
    parser.add_argument(
        "--label-key",
        metavar="KEY",
        help="key of each text's label, for classification (with --classes)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="the labels; their order must not change later",
    )


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    files = ".jsonl or .txt, also with .gz or .zst; .parquet; - for standard input"
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=files)
    parser.add_argument("--text-key", default="text", help="key or column that holds the text")
    parser.add_argument(
        "--format",
        choices=("jsonl", "txt", "parquet"),
        help="format of inputs whose names do not tell",
    )
    parser.add_argument(
        "--blank-lines",
        action="store_true",
        help="blank lines separate the documents of a .txt; otherwise it is one document",
    )
    _add_forms(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--workers", type=at_least(1), default=1, metavar="N", help="processes that tokenize"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the end-of-sequence token"
    )
    parser.add_argument(
        "--cls-sep", action="store_true", help="for encoders: start with [CLS], end with [SEP]"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad line instead of counting it"
    )
    args = parser.parse_args(argv)
    if args.template is not None and not args.pairs:
        raise ConfigError(f"--template: {args.template}: only with --pairs")
    return args


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    args = arguments(argv)
    counts = preprocess(
        args.input,
        args.tokenizer,
        args.output,
        text_key=args.text_key,
        workers=args.workers,
        append_eod=args.append_eod,
        cls_sep=args.cls_sep,
        strict=args.strict,
        overwrite=args.overwrite,
        kind=args.format,
        paragraphs=args.blank_lines,
        chat=args.chat,
        label_key=args.label_key,
        classes=args.classes,
        template=args.template or TEMPLATE if args.pairs else None,
    )
    for line in counts.named:
        print(f"bad line: {line}", file=sys.stderr)
    forms = ", ".join(f"{count} samples as {form}" for form, count in counts.forms.items())
    by_form = f"; {forms}" if forms else ""
    print(
        f"{args.output}: {counts.documents} documents, {counts.tokens} tokens, {counts.empty} empty documents left "
        f"out, {counts.bad} bad lines{by_form}"
    )
    return 0
