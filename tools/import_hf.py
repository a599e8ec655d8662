#!/usr/bin/env python3
"""Turn a Hugging Face folder into a checkpoint that any layout loads; its logits are held against transformers'."""

import argparse

import megalite.ranks.interrupt  # noqa: F401  (first: Ctrl-C during the other imports)
from megalite.hub.import_hf import import_hf
from megalite.ranks.launch import ArgumentParser, run_program


def main(argv: list[str]) -> int:
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


if __name__ == "__main__":
    run_program(main)
