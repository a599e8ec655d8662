"""Show and check indexed corpora, and show how many samples a blend takes from each."""

import argparse
import os
import shutil
import sys

from megalite.data.inspection import Show, inspect
from megalite.ranks.arguments import ArgumentParser, at_least, positive, share

SHOWN, SHOWN_MARKED = 200, 2000


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "prefix", nargs="+", metavar="PREFIX", help="a corpus, PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="show documents as text; with --verify: ids must be in its vocabulary",
    )
    parser.add_argument(
        "--vocab-size",
        dest="vocabulary_size",
        type=at_least(1),
        metavar="N",
        help="with --verify: ids must be below N",
    )
    _add_shown(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read and check everything: structure, sizes, pointers, ids, checksums",
    )
    _add_blend(parser)
    args = parser.parse_args(argv)
    if args.width is None:
        args.width = SHOWN_MARKED if args.mask or args.masked else SHOWN
    return args


def _add_shown(parser: ArgumentParser) -> None:
    """Adds the options for which documents are shown, and how."""
    parser.add_argument(
        "--documents",
        type=at_least(0),
        default=2,
        metavar="N",
        help="documents to show of each corpus",
    )
    parser.add_argument(
        "--first",
        type=at_least(0),
        default=0,
        metavar="N",
        help="number of the first document to show",
    )
    parser.add_argument(
        "--width",
        type=at_least(1),
        metavar="N",
        help=f"characters to show of a document (default: {SHOWN}; with --mask or --masked: {SHOWN_MARKED:,})",
    )
    marking = parser.add_mutually_exclusive_group()
    marking.add_argument(
        "--mask",
        action="store_true",
        help="show which tokens are trained on, by PREFIX.mask: in colour, or in [[ ]] if there is no terminal",
    )
    marking.add_argument(
        "--masked",
        type=share,
        metavar="SHARE",
        help="show the tokens that masked language modelling predicts, in one draw of this share of all tokens",
    )


def _add_blend(parser: ArgumentParser) -> None:
    """Adds the options for a blend of the corpora."""
    parser.add_argument(
        "--weights",
        type=positive,
        nargs="+",
        metavar="W",
        help="weights of a blend, one per PREFIX",
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=10_000,
        metavar="N",
        help="samples of the blend",
    )
    parser.add_argument(
        "--sequence-length",
        type=at_least(1),
        default=1024,
        metavar="S",
        help="tokens in a sample",
    )


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    args = vars(arguments(argv))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    columns = shutil.get_terminal_size().columns
    for line in inspect(args.pop("prefix"), Show(**args, columns=columns, colour=colour)):
        print(line)
    return 0
