"""Convert a checkpoint to a Hugging Face folder, and compare its logits with transformers'."""

import argparse
import sys
from pathlib import Path

from megalite.checkpoint.files import best_checkpoint
from megalite.hub.carried import tokenizer_files
from megalite.hub.export_folder import DTYPES, export_hf
from megalite.hub.sources import open_weights, prompts_both_ways
from megalite.inference.prepare import BEST_HELP
from megalite.ranks.arguments import ArgumentParser
from megalite.ranks.run_program import program_name


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="a run folder (its newest), or one of its checkpoints"
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="default: float32, the stored masters"
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="default: if there is enough memory"
    )
    args = parser.parse_args(argv)
    source = best_checkpoint(args.checkpoint) if args.best else args.checkpoint
    compared = export_hf(source, args.output, args.dtype, args.verify)
    print(f"{args.output}: {compared or 'written; not verified'}")
    if prompts_both_ways(open_weights(Path(args.output)).state):
        print(
            f"{program_name()}: {args.output}: this model attends to prompts bidirectionally (prefix LM), "
            "transformers' generate causally: its texts differ",
            file=sys.stderr,
        )
    if next(tokenizer_files(Path(args.output)), None) is None:
        print(
            f"{program_name()}: {args.output}: has no tokenizer: the checkpoint carries none",
            file=sys.stderr,
        )
    return 0
