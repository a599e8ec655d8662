"""The forms of a line with a conversation, distinguished by their fields, and their conversion for a chat template.

    messages                {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    prompt and completion   {"prompt": "…", "completion": "…"}        or both as lists of messages
    ShareGPT                {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}
    Alpaca                  {"instruction": "…", "input": "…", "output": "…"}

An assistant message may have `tool_calls`, messages of the role `tool` contain their results, and the line's `tools`
describes the tools to the template. ShareGPT and Alpaca lines may have a `system` message.
A field that is null counts as missing. Next: chat_encoder.py, which renders conversations and marks the answers.
"""

import json
from dataclasses import dataclass
from typing import Any

from megalite.config.section import shown

Message = dict[str, Any]
MESSAGES, WITH_TOOLS, COMPLETION = "messages", "messages with tools", "prompt and completion"
SHARE_GPT, ALPACA = "ShareGPT", "Alpaca"

_ROLES = {  # by ShareGPT's `from`
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_FORMS = '"messages", "conversations", "prompt" and "completion", or "instruction" and "output"'


class NotChat(ValueError):
    """A line that is not a conversation; the message names the field and the rule that it breaks."""


@dataclass(frozen=True)
class Completion:
    """A prompt and the completion that follows it."""

    prompt: str
    completion: str
    form: str = COMPLETION


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template. places: for each message the field of the line that contains it; first: index of
    the first message that may count in the loss; tools: for the template, None if there are none."""

    form: str
    messages: list[Message]
    places: list[str]
    tools: list[dict[str, Any]] | None = None
    first: int = 0


def sample_of(line: dict[str, Any]) -> Conversation | Completion:
    """Converts a line of any form. Raises NotChat."""
    line = {key: value for key, value in line.items() if value is not None}
    if "messages" in line:
        return _of_messages(line)
    if "conversations" in line:
        return _of_share_gpt(line)
    if "prompt" in line and "completion" in line:
        return _of_completion(line)
    if "instruction" in line and "output" in line:
        return _of_alpaca(line)
    raise NotChat(f"must have {_FORMS}: has {shown(list(line))}")


def messages_of(value: Any, place: str) -> list[Message]:
    """Messages with `role` and `content` in the form for templates: without fields that are null, and with the
    arguments of tool calls as objects. place: name of the list, for errors. Raises NotChat."""
    if not isinstance(value, list) or not value:
        raise _broken(place, value, "must be a list of messages")
    return [_message(message, f"{place}.{i}") for i, message in enumerate(value)]


def tools_of(line: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A line's `tools`: a list of objects, or its JSON as a string, for tables with one type per column. Raises
    NotChat."""
    value = line.get("tools")
    if isinstance(value, str):
        value = _parsed(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _broken("tools", value, "must be a list of objects, or the JSON of one as a string")
    return value


def _of_messages(line: dict[str, Any]) -> Conversation:
    messages, tools = messages_of(line["messages"], "messages"), tools_of(line)
    used = any("tool_calls" in message or message["role"] == "tool" for message in messages)
    form = WITH_TOOLS if used or tools else MESSAGES
    return Conversation(form, messages, _places("messages", messages), tools)


def _of_completion(line: dict[str, Any]) -> Conversation | Completion:
    prompt, completion = line["prompt"], line["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    before, after = messages_of(prompt, "prompt"), messages_of(completion, "completion")
    places = _places("prompt", before) + _places("completion", after)
    return Conversation(COMPLETION, before + after, places, tools_of(line), first=len(before))


def _of_share_gpt(line: dict[str, Any]) -> Conversation:
    turns = line["conversations"]
    if not isinstance(turns, list) or not turns:
        raise _broken("conversations", turns, "must be a list of messages")
    messages = [_turn(turn, f"conversations.{i}") for i, turn in enumerate(turns)]
    _name_results(messages)
    places, system = _places("conversations", messages), _system(line)
    return Conversation(
        SHARE_GPT, system + messages, ["system"] * len(system) + places, tools_of(line)
    )


def _of_alpaca(line: dict[str, Any]) -> Conversation:
    for key in ("instruction", "input", "output"):
        if not isinstance(line.get(key, ""), str):
            raise _broken(key, line[key], "must be a string")
    if line.get("history"):
        rule = 'must be empty: use "messages" for several turns'
        raise _broken("history", line["history"], rule)
    question = "\n".join(part for part in (line["instruction"], line.get("input")) if part)
    system = _system(line)
    messages = [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": line["output"]},
    ]
    places = ["system"] * len(system) + ["instruction", "output"]
    return Conversation(ALPACA, messages, places, tools_of(line))


def _system(line: dict[str, Any]) -> list[Message]:
    """The system message in its own field of a line, as a list; empty if there is none."""
    text = line.get("system", "")
    if not isinstance(text, str):
        raise _broken("system", text, "must be a string")
    return [{"role": "system", "content": text}] if text else []


def _turn(turn: Any, place: str) -> Message:
    """A message in ShareGPT's form."""
    if not isinstance(turn, dict):
        raise _broken(place, turn, "must be an object")
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise _broken(f"{place}.from", speaker, f"must be one of {', '.join(_ROLES)}")
    if not isinstance(value, str):
        raise _broken(f"{place}.value", value, "must be a string")
    if speaker != "function_call":
        return {"role": _ROLES[speaker], "content": value}
    calls = _parsed(value, f"{place}.value")
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": _tool_calls(calls, f"{place}.value"),
    }


def _name_results(messages: list[Message]) -> None:
    """Adds the functions' names to the results of their calls, in order: some templates need them."""
    names: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        elif message["role"] == "tool" and names:
            message["name"] = names.pop(0)


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise _broken(place, value, "must be an object")
    message = {key: part for key, part in value.items() if part is not None}
    if not isinstance(message.get("role"), str):
        raise _broken(f"{place}.role", message.get("role"), "must be a string")
    calls = message.pop("tool_calls", None)
    if calls:  # in tables, a message without calls may have an empty list
        if message["role"] != "assistant":
            raise _broken(f"{place}.tool_calls", calls, "must be in an assistant message")
        message["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
        message.setdefault("content", "")  # templates would render None
    if not isinstance(message.get("content"), str):
        raise _broken(f"{place}.content", message.get("content"), "must be a string")
    return message


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Calls in the form for templates: {"type": "function", "function": {"name": …, "arguments": {…}}}."""
    if not isinstance(calls, list):
        raise _broken(place, calls, "must be a list of calls")
    result = []
    for i, call in enumerate(calls):
        at = f"{place}.{i}"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _broken(at, call, "must be an object with the name and arguments of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{at}.arguments")
        if not isinstance(arguments, dict):
            rule = "must be an object, or the JSON of one as a string"
            raise _broken(f"{at}.arguments", arguments, rule)
        around = {} if function is call else call
        whole = {"name": function["name"], "arguments": arguments}
        result.append({"type": "function", **around, "function": whole})
    return result


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise _broken(place, text, "must be JSON") from None


def _places(key: str, messages: list[Message]) -> list[str]:
    return [f"{key}.{i}" for i in range(len(messages))]


def _broken(place: str, value: Any, rule: str) -> NotChat:
    return NotChat(f"{place}: {'missing' if value is None else shown(value)}: {rule}")
