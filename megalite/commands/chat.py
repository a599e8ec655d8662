"""Talk to a model: a run folder, a checkpoint or a Hugging Face folder whose tokenizer has a chat template.

A line is a message; the answer is printed as it grows. Where standard input is no terminal, each of its lines is a
message too, and only the answers are printed, one after another. /reset forgets the conversation, /quit ends it.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from megalite.errors import ConfigError
from megalite.inference.prepare import DTYPES
from megalite.inputs import parse_json, read_text
from megalite.ranks.launch import ArgumentParser, at_least

_PROMPT = "> "


def main(arguments: list[str]) -> int:
    """Talks until the input ends; the exit code."""
    options = _parse(arguments)
    from megalite.api import load

    model = load(options.model, options.dtype)
    if options.messages is not None:
        messages = _read_messages(options.messages)
        print(model.chat(messages, on_text=None, **_sampling(options)))
        return 0
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    model.chat_ids(
        [*system, {"role": "user", "content": "."}]
    )  # a missing template is reported at once
    history: list[dict[str, str]] = []
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            history.clear()
        elif line:
            history.append({"role": "user", "content": line})
            answer = model.chat([*system, *history], on_text=_show, **_sampling(options))
            print(flush=True)
            history.append({"role": "assistant", "content": answer})
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="the system message, before all others")
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help='answer a conversation once: a JSON list of {"role": …, "content": …}, - for standard input',
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the likeliest token (0.7)"
    )
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k likeliest")
    parser.add_argument("--top-p", type=float, default=None, help="as of generate (1.0)")
    parser.add_argument("--min-p", type=float, default=None, help="as of generate (0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="as of generate (1)")
    parser.add_argument("--seed", type=at_least(0), default=1234)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    return parser.parse_args(arguments)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Model.chat` that were given."""
    names = [
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
    ]
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _lines() -> Iterator[str]:
    """The user's messages, with line editing where there is a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    with contextlib.suppress(EOFError):
        while True:
            yield input(_PROMPT).strip()


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_messages(path: str) -> list[dict[str, str]]:
    """A conversation from a file. Raises ConfigError where it holds none."""
    text = sys.stdin.read() if path == "-" else read_text(path)
    value = parse_json(text, f"--messages: {path}")
    value = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ConfigError(f"--messages: {path}: must be a list of messages")
    for number, message in enumerate(value):
        fields = (
            [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else []
        )
        if not fields or not all(isinstance(field, str) for field in fields):
            rule = 'must be {"role": …, "content": …}'
            raise ConfigError(
                f"--messages: {path}: message {number}: {json.dumps(message)[:80]}: {rule}"
            )
    return value
