"""Lines of conversations and of prompts with completions to tokens, and marks of those that the loss counts.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"prompt": "…", "completion": "…"}        or both as lists of messages

Messages go through the tokenizer's chat template. What the loss counts is what the model would have to write:
an assistant's message with the end that the template gives it, or a completion with the end-of-document
token. A template with `{% generation %}` says that itself; for others it is what is between the text
of the conversation so far with the template's opening for an answer, and the text with the answer.
"""

import hashlib
import itertools
import pickle
import re
from typing import Any

from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.errors import DataError

Marked = tuple[list[int], list[int]]  # token ids, and of each 1 where the loss counts it
Span = tuple[int, int]
_SHOWN_CHARACTERS = 200  # of what a template says
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class NotChat(ValueError):
    """A line that holds neither form, with the reason."""


class ChatEncoder:
    """Lines to documents of marked tokens; it can be sent to another process."""

    def __init__(self, tokenizer: Tokenizer, folder: str) -> None:
        """Raises DataError for a tokenizer that is not Hugging Face's, or that is not a fast one: the places
        of tokens in the text are needed."""
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.inner.is_fast:
            raise DataError(f"{folder}: must be a fast Hugging Face tokenizer for --chat")
        self._inner, self._eod_id = tokenizer.inner, tokenizer.eod_id
        template = self._inner.chat_template
        self._template = template.get("default", "") if isinstance(template, dict) else template
        self._encoder = tokenizer.encoder()

    def fingerprint(self) -> str:
        """Fingerprint of everything the output depends on."""
        return hashlib.sha256(
            pickle.dumps((self._template, self._encoder, self._eod_id))
        ).hexdigest()

    def encode(self, line: dict[str, Any]) -> list[Marked]:
        """The documents of a line: one, or one an answer where the template writes earlier answers otherwise
        than last ones. Raises NotChat."""
        if "messages" in line:
            return self._conversation(_messages(line["messages"], "messages"), 0)
        if "prompt" not in line or "completion" not in line:
            raise NotChat('has neither "messages" nor "prompt" and "completion"')
        prompt, completion = line["prompt"], line["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            try:
                ids, marks = self._marked(
                    prompt + completion, [(len(prompt), len(prompt) + len(completion))]
                )
            except Exception as error:
                raise NotChat(f"cannot be tokenized: {_said(error)}") from None
            end = [] if self._eod_id is None else [self._eod_id]
            return [(ids + end, marks + [1] * len(end))]
        before = _messages(prompt, "prompt")
        return self._conversation(before + _messages(completion, "completion"), len(before))

    def _conversation(self, messages: list[dict[str, Any]], first: int) -> list[Marked]:
        """The documents of a conversation of which the answers from message `first` on count."""
        if not self._template:
            raise NotChat("needs a chat template, which the tokenizer does not have")
        answers = [
            i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"
        ]
        if not answers:
            raise NotChat("holds no message of the assistant")
        try:
            if first == 0 and _GENERATION.search(self._template):
                return [self._by_template(messages)]
            return self._by_difference(messages, answers)
        except NotChat:
            raise
        except Exception as error:  # a template is a program: it can raise anything over a message
            raise NotChat(f"is refused by the chat template: {_said(error)}") from None

    def _by_template(self, messages: list[dict[str, Any]]) -> Marked:
        found = self._inner.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"split_special_tokens": False},
        )
        return list(found["input_ids"]), [int(mark) for mark in found["assistant_masks"]]

    def _by_difference(self, messages: list[dict[str, Any]], answers: list[int]) -> list[Marked]:
        texts, spans = [], []
        for i in answers:
            opened = self._inner.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True
            )
            answered = self._inner.apply_chat_template(messages[: i + 1], tokenize=False)
            if not answered.startswith(opened):
                raise NotChat(
                    f"message {i}: the chat template does not continue its own opening of an answer"
                )
            texts.append(answered)
            spans.append(
                (len(opened), len(answered.rstrip()))
            )  # a line's end after the turn is the template's
        if all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)):
            return [self._marked(texts[-1], spans)]
        return [self._marked(text, [span]) for text, span in zip(texts, spans, strict=True)]

    def _marked(self, text: str, spans: list[Span]) -> Marked:
        """A text's tokens, marked where they hold text of a span. One that begins before it counts too: it holds
        the answer's beginning (a prompt that ends in a space makes such tokens)."""
        found = self._inner(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False
        )
        marks = [
            int(any(begin < stop and start < end for start, stop in spans))
            for begin, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), marks


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise NotChat(f'"{name}" is no list of messages')
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NotChat(f'"{name}": message {i} has no role')
        if not isinstance(message.get("content"), str):
            raise NotChat(f'"{name}": message {i} has no text as its content')
    return value
