"""Talk to a model: a run folder, a checkpoint or a Hugging Face folder whose tokenizer has a chat template.

Each line is a message; a message of several lines goes between two lines with only \"\"\". Answers are printed as they
are generated. If standard input is not a terminal, its lines are messages too, and only the answers are printed.
/reset forgets the conversation, /quit ends it.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from megalite.checkpoint.files import best_checkpoint
from megalite.data.chat_forms import NotChat, messages_of, tools_of
from megalite.errors import ConfigError
from megalite.inference.prepare import BEST_HELP, DTYPES
from megalite.inputs import decoding, parse_json, read_standard_input, read_text
from megalite.ranks.arguments import ArgumentParser, RawHelpFormatter, any_text, at_least

_PROMPT = "> "
_FENCE = '"""'  # before and after a message of several lines
STANDARD_INPUT = "-"

Message = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Talks until the input ends; returns the exit code."""
    options = _parse(arguments)
    _check_samples(options)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    asked, tools = _asked(options)
    if system and asked and asked[0].get("role") == "system":
        raise ConfigError(f"--system: {options.messages} already begins with a system message")
    from megalite.api import load
    from megalite.ranks.devices import use_exact_products

    use_exact_products()
    model = load(best_checkpoint(options.model) if options.best else options.model, options.dtype)
    if asked:
        _answer(model, [*system, *asked], tools, options)
        return 0
    # A missing template is reported at once.
    model.chat_ids([*system, {"role": "user", "content": "."}])
    _converse(model, system, options)
    return 0


def _converse(model: Any, system: list[Message], options: argparse.Namespace) -> None:
    """Answers the messages of standard input, each with those before it."""
    history: list[Message] = []
    for text in _messages(_lines()):
        if text == "/quit":
            break
        if text == "/reset":
            history.clear()
        elif text:
            history.append({"role": "user", "content": text})
            messages = [*system, *history]
            try:
                sampling = _sampling(options, model, messages)
                answer = model.chat(messages, on_text=_show, **sampling)
            except ConfigError as error:
                if not sys.stdin.isatty():
                    raise
                way_out = ": /reset starts a new one" if isinstance(error, _Full) else ""
                print(f"{error}{way_out or '; the message is ignored'}", file=sys.stderr)
                history.pop()
                continue
            print(flush=True)
            history.append({"role": "assistant", "content": answer})


def _answer(
    model: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    options: argparse.Namespace,
) -> None:
    """Prints the answer to a conversation, or several as one JSON object per line."""
    sampling = _sampling(options, model, messages, tools)
    if options.samples == 1:
        model.chat(messages, on_text=_show, tools=tools, **sampling)
        print(flush=True)
        return
    for sample in range(options.samples):
        text = model.chat(messages, tools=tools, **sampling | {"seed": options.seed + sample})
        print(json.dumps({"sample": sample, "text": text}, ensure_ascii=False), flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="a run, a checkpoint or a Hugging Face folder")
    parser.add_argument(
        "--system", type=any_text, metavar="TEXT", help="the system message, before all others"
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    once = parser.add_mutually_exclusive_group()
    once.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer one message, which may contain newlines; - reads it from standard input",
    )
    once.add_argument(
        "--messages",
        metavar="FILE",
        help='answer a conversation once: a JSON list of {"role": …, "content": …}, or an object with it as '
        "`messages`, and `tools`; - for standard input",
    )
    parser.add_argument(
        "--samples",
        type=at_least(1),
        default=1,
        metavar="N",
        help="answers to --prompt or --messages, each a JSON object on a line; the i-th has seed + i",
    )
    parser.add_argument("--max-new-tokens", type=at_least(1), default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0: always the likeliest token"
    )
    parser.add_argument("--top-k", type=at_least(1), help="sample from the k likeliest")
    parser.add_argument("--top-p", type=float, default=None, help="as in generate (default: 1.0)")
    parser.add_argument("--min-p", type=float, default=None, help="as in generate (default: 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="as in generate")
    parser.add_argument("--seed", type=at_least(0), default=1234)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    return parser.parse_args(arguments)


class _Full(ConfigError):
    """The conversation leaves no room for an answer."""


def _sampling(
    options: argparse.Namespace,
    model: Any,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The given arguments of `Model.chat`, with at most as many new tokens as fit after the messages. Raises _Full if
    none fit."""
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
    most = model.stage.spec.max_positions
    if most is not None:
        used = len(model.chat_ids(messages, tools))
        if used >= most:
            raise _Full(f"the conversation has {used} tokens and the model takes at most {most}")
        given["max_new_tokens"] = min(options.max_new_tokens, most - used)
    return {name: value for name, value in given.items() if value is not None}


def _check_samples(options: argparse.Namespace) -> None:
    """Raises ConfigError for several samples if only one is possible."""
    if options.samples == 1:
        return
    if options.prompt is None and options.messages is None:
        rule = "needs --prompt or --messages: a conversation continues from one answer"
    elif options.temperature == 0.0:
        rule = "needs --temperature above 0: with 0 all samples are equal"
    else:
        return
    raise ConfigError(f"--samples: {options.samples}: {rule}")


def _asked(options: argparse.Namespace) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages to be answered once, and the tools for the template; empty for an interactive conversation."""
    if options.messages is not None:
        return _read_messages(options.messages)
    if options.prompt is None:
        return [], None
    text = read_standard_input("--prompt") if options.prompt == STANDARD_INPUT else options.prompt
    if not text:
        raise ConfigError("--prompt: must not be empty")
    return [{"role": "user", "content": text}], None


def _lines() -> Iterator[str]:
    """The lines of standard input, with line editing in a terminal."""
    if not sys.stdin.isatty():
        with decoding("standard input"):
            yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    with contextlib.suppress(EOFError), decoding("standard input"):
        while True:
            yield input(_PROMPT)


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """The user's messages: each line, or the lines between two fences."""
    for line in lines:
        if line.strip() != _FENCE:
            yield line.strip()
            continue
        yield "\n".join(itertools.takewhile(lambda part: part.strip() != _FENCE, lines))


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _read_messages(path: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """A conversation from a file, and its tools. Raises ConfigError if it has none."""
    text = read_standard_input("--messages") if path == STANDARD_INPUT else read_text(path)
    value = parse_json(text, f"--messages: {path}")
    line = value if isinstance(value, dict) else {"messages": value}
    try:
        return messages_of(line.get("messages"), "messages"), tools_of(line)
    except NotChat as error:
        raise ConfigError(f"--messages: {path}: {error}") from None
