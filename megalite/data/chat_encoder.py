"""Tokenizes conversations, and prompts with completions, and marks the tokens that count in the loss.

`chat_forms.py` reads the lines. The tokenizer's chat template renders messages. The loss counts what the model has to
generate: an assistant's message with the template's end of turn, or a completion with the end-of-document token. A
template with `{% generation %}` marks these tokens itself. With other templates they are the difference between the
text of the conversation up to the template's generation prompt, and the text with the answer.
"""

import hashlib
import itertools
import pickle
import re
from typing import Any

from megalite.data.chat_forms import Completion, Conversation, NotChat, sample_of
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.errors import DataError

Marked = tuple[list[int], list[int]]  # token ids, and for each 1 if the loss counts it, else 0
Span = tuple[int, int]
_SHOWN_CHARACTERS = 200  # of a template's error message
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOOLS = re.compile(r"\btools\b")


class ChatEncoder:
    """Converts lines to documents of marked tokens; can be pickled for another process."""

    def __init__(self, tokenizer: Tokenizer, folder: str) -> None:
        """Raises DataError for a tokenizer that is not a fast Hugging Face tokenizer: the positions of tokens in the
        text are needed."""
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.inner.is_fast:
            raise DataError(f"{folder}: must be a fast Hugging Face tokenizer for --chat")
        self._folder, self._inner, self._eod_id = folder, tokenizer.inner, tokenizer.eod_id
        self._encoder = tokenizer.encoder()

    def fingerprint(self) -> str:
        """Fingerprint of everything the output depends on."""
        return hashlib.sha256(
            pickle.dumps((self._inner.chat_template, self._encoder, self._eod_id))
        ).hexdigest()

    def encode(self, line: dict[str, Any]) -> list[Marked]:
        """The documents of a line; see `documents`. Raises NotChat."""
        return self.documents(sample_of(line))

    def documents(self, sample: Conversation | Completion) -> list[Marked]:
        """The documents of a sample: one, or one per answer if the template renders earlier answers differently from
        the last one. Raises NotChat; DataError for a conversation if the tokenizer has no chat template."""
        if isinstance(sample, Completion):
            return [self._completion(sample.prompt, sample.completion)]
        answers = [
            i
            for i, message in enumerate(sample.messages)
            if i >= sample.first and message["role"] == "assistant"
        ]
        if not answers:
            key = sample.fields[-1].partition(".")[0]
            raise NotChat(f"{key}: must contain an assistant message")
        if not self._inner.chat_template:
            rule = "conversations need one, as chat_template in tokenizer_config.json; prompts with completions do not"
            raise DataError(f"{self._folder}: the tokenizer has no chat template: {rule}")
        try:
            template = self._inner.get_chat_template(None, sample.tools)
            _check_tools(sample, template)
            if sample.first == 0 and _GENERATION.search(template):
                return [self._by_template(sample)]
            return self._by_difference(sample, answers)
        except NotChat:
            raise
        except Exception as error:  # a template is a program, which can raise anything
            raise NotChat(f"is rejected by the chat template: {_reason(error)}") from None

    def _completion(self, prompt: str, completion: str) -> Marked:
        try:
            ids, marks = self._marked(
                prompt + completion, [(len(prompt), len(prompt) + len(completion))]
            )
        except Exception as error:
            raise NotChat(f"cannot be tokenized: {_reason(error)}") from None
        end = [] if self._eod_id is None else [self._eod_id]
        return ids + end, marks + [1] * len(end)

    def _by_template(self, sample: Conversation) -> Marked:
        found = self._inner.apply_chat_template(
            sample.messages,
            tools=sample.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"split_special_tokens": False},
        )
        marks = [int(mark) for mark in found["assistant_masks"]]
        if not any(marks):
            raise NotChat(
                "the chat template's {% generation %} contains no tokens of these messages"
            )
        return list(found["input_ids"]), marks

    def _by_difference(self, sample: Conversation, answers: list[int]) -> list[Marked]:
        texts, spans = [], []
        for i in answers:
            if i == 0:
                raise NotChat(
                    f"{sample.fields[0]}: must not be an assistant message: no message comes before it"
                )
            opened = self._text(sample, i, opened=True)
            answered = self._text(sample, i + 1)
            if not answered.startswith(opened):
                rule = "the chat template's text with the answer does not begin with its generation prompt"
                raise NotChat(f"{sample.fields[i]}: {rule}")
            texts.append(answered)
            # A newline after the turn belongs to the template.
            spans.append((len(opened), len(answered.rstrip())))
        if all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)):
            return [self._marked(texts[-1], spans)]
        return [self._marked(text, [span]) for text, span in zip(texts, spans, strict=True)]

    def _text(self, sample: Conversation, count: int, opened: bool = False) -> str:
        """The first `count` messages as rendered by the template; opened: with its generation prompt."""
        return self._inner.apply_chat_template(
            sample.messages[:count],
            tools=sample.tools,
            tokenize=False,
            add_generation_prompt=opened,
        )

    def _marked(self, text: str, spans: list[Span]) -> Marked:
        """A text's tokens, marked if they contain text of a span. This includes a token that begins before the span but
        contains its start (a prompt that ends in a space gives such tokens)."""
        found = self._inner(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False
        )
        marks = [
            int(any(begin < stop and start < end for start, stop in spans))
            for begin, end in found["offset_mapping"]
        ]
        return list(found["input_ids"]), marks


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__


def _check_tools(sample: Conversation, template: str) -> None:
    """Raises NotChat for fields that a template would silently ignore."""
    if sample.tools is not None and not _TOOLS.search(template):
        raise NotChat("tools: must be left out: the chat template does not use them")
    for message, field in zip(sample.messages, sample.fields, strict=True):
        if "tool_calls" in message and "tool_calls" not in template:
            rule = "must be left out: the chat template does not render them"
            raise NotChat(f"{field}.tool_calls: {rule}")
