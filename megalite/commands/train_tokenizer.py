"""Train a tokenizer on text files. transformers and megalite both read the folder, and sentencepiece too, except for
wordpiece, which is for encoders and has [CLS], [SEP], [MASK] and [PAD]."""

import argparse

from megalite.data.tokenizer_training import MAX_SENTENCES, train_tokenizer
from megalite.data.wordpiece import train_wordpiece
from megalite.errors import ConfigError
from megalite.ranks.arguments import ArgumentParser, at_least


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl, .txt, .parquet, .gz, .zst",
    )
    parser.add_argument("--text-key", default="text", help="key or column that holds the text")
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        required=True,
        metavar="N",
        help="number of tokens, including special ones",
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram", "wordpiece"), default="bpe")
    parser.add_argument(
        "--lowercase",
        action="store_true",
        help="for wordpiece: fold case and accents, as in uncased BERT",
    )
    parser.add_argument(
        "--max-sentences",
        type=at_least(1),
        metavar="N",
        help=f"for bpe and unigram: lines to train on, sampled evenly (default: {MAX_SENTENCES:,})",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The program; returns its exit code."""
    args = arguments(argv)
    if args.model_type == "wordpiece":
        if args.max_sentences is not None:
            rule = "only with --model-type bpe or unigram"
            raise ConfigError(f"--max-sentences: {args.max_sentences}: {rule}")
        train_wordpiece(args.input, args.vocab_size, args.output, args.text_key, args.lowercase)
    elif args.lowercase:
        raise ConfigError("--lowercase: only with --model-type wordpiece")
    else:
        most = args.max_sentences or MAX_SENTENCES
        train_tokenizer(
            args.input, args.vocab_size, args.model_type, args.output, args.text_key, most
        )
    print(f"{args.output}: a tokenizer of {args.vocab_size:,} tokens")
    return 0
