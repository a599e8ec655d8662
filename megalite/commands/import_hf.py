"""Turn a Hugging Face folder into a checkpoint that any layout loads; its logits are held against transformers'."""

import argparse

from megalite.hub.import_hf import import_hf
from megalite.ranks.launch import ArgumentParser


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="config.json and safetensors files"
    )
    parser.add_argument("--output", required=True, metavar="CHECKPOINT", help="a new folder")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="default: where memory is enough"
    )
    args = parser.parse_args(argv)
    compared = import_hf(args.model, args.output, args.verify)
    print(f"{args.output}: {compared or 'written; not verified'}")
    return 0
