"""Convert a Hugging Face folder to a checkpoint that any layout loads, and compare its logits with transformers'."""

import argparse

from megalite.errors import ConfigError
from megalite.hub.import_folder import import_hf
from megalite.hub.upcycle import UpcyclingOptions
from megalite.ranks.arguments import ArgumentParser, at_least


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="config.json and safetensors files"
    )
    parser.add_argument("--output", required=True, metavar="CHECKPOINT", help="a new folder")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="default: if there is enough memory"
    )
    parser.add_argument(
        "--experts",
        type=at_least(1),
        metavar="N",
        help="turn a dense model (llama, mistral, qwen3) into one with N experts per layer",
    )
    parser.add_argument(
        "--experts-per-token", type=at_least(1), metavar="K", help="with --experts; default: 2"
    )
    args = parser.parse_args(argv)
    if args.experts is None and args.experts_per_token is not None:
        raise ConfigError(f"--experts-per-token: {args.experts_per_token}: needs --experts")
    experts = args.experts and UpcyclingOptions(args.experts, args.experts_per_token or 2)
    compared = import_hf(args.model, args.output, args.verify, experts)
    print(f"{args.output}: {compared or 'written; not verified'}")
    return 0
