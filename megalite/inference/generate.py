"""Generation on any layout of the pipe and tensor axes: prompts of different lengths in batches, with a cache.

Prompts of a batch are padded on the left, so that the newest token is the last column of every row. There are as many
batches in flight as stages: while one is on the last stage, another is on the first. Hidden states go from stage to
stage; the tokens that the last stage chooses are sent to all others, so every stage knows every text. B prompts per
batch, S tokens per row, D hidden.

For an encoder-decoder the prompts are sources: they go through the encoder in the first pass, together with the token
that starts a target, and the text is the target. Later passes have no source; layers with cross-attention have cached
its keys and values.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.inference.beams import Beams, Hypotheses, candidates
from megalite.inference.sampling import Sampling, choose
from megalite.model.context import Context, KeyValueCache
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.forwards import Forwards

OnToken = Callable[[int, int], None]
"""Called with a prompt's number and its next token, as soon as a rank knows it."""
Ends = Callable[[list[int]], bool]
"""Whether a text with these new tokens ends; the same on every rank."""


@dataclass
class Text:
    """A prompt and its continuation. number: of the prompt. finished: "" while it grows, then "stop" or "length"."""

    number: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    finished: str = ""


def check_lengths(
    spec: TransformerSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises ConfigError if a prompt is empty, or if prompt and new tokens exceed the model's positions."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: {max_new_tokens}: must be at least 1")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {number}: is empty: must hold at least one token")
        length = len(prompt) + max_new_tokens
        if spec.max_positions is not None and length > spec.max_positions:
            raise ConfigError(
                f"--max-new-tokens: {max_new_tokens}: prompt {number} has {len(prompt)} tokens: the sum must be at "
                f"most the model's max_position_embeddings {spec.max_positions}"
            )


class Generator:
    """Generates texts with this rank's stage. All ranks of the model plane must call `generate` together, with equal
    arguments.

    batch_size: prompts that go through the stages together; one batch per stage is in flight. prefixed: attention
    within a prompt is bidirectional.
    """

    def __init__(
        self, stage: Stage, grid: Grid, batch_size: int = 8, prefixed: bool = False
    ) -> None:
        self.stage, self.grid, self.batch_size = stage.eval(), grid, batch_size
        self.prefixed = prefixed
        weight = next(stage.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        on_token: OnToken | None = None,
        numbers: Sequence[int] | None = None,
        ends: Ends = lambda tokens: False,
        beams: Beams | None = None,
    ) -> list[Text]:
        """A text for each prompt, on every rank. A text ends with the first of `stop_ids`, when `ends` returns True, or
        after `max_new_tokens`.

        numbers: of the prompts, for the seed, if they are part of a longer list. beams: use beam search instead of
        `sampling`; `on_token` is then not called. Raises ConfigError.
        """
        check_lengths(self.stage.spec, prompts, max_new_tokens)
        numbers = numbers if numbers is not None else range(len(prompts))
        texts = [
            Text(number, list(prompt)) for number, prompt in zip(numbers, prompts, strict=True)
        ]
        forwards = Forwards(self.grid.pipe, self.dtype, self.device)
        batches = _Batches(texts, self, max_new_tokens, sampling or Sampling(), forwards, beams)
        batches.run(stop_ids, ends, on_token)
        return texts


def generate_all(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    ends: Ends,
    on_token: OnToken | None = None,
    beams: Beams | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, on every rank: the prompts are divided over the data axis (collective over the
    world). Arguments as in `Generator.generate`."""
    data = generator.grid.data
    own = range(data.rank, len(prompts), data.size)
    found = generator.generate(
        [prompts[number] for number in own],
        max_new_tokens,
        sampling,
        stop_ids,
        on_token,
        own,
        ends,
        beams,
    )
    everyone: list[dict[int, list[int]]] = [{}] * generator.grid.world_size
    dist.all_gather_object(everyone, {text.number: text.tokens for text in found})
    tokens = {number: some for part in everyone for number, some in part.items()}
    return [tokens[number] for number in range(len(prompts))]


def ends_at(tokenizer: Tokenizer, stops: Sequence[str]) -> Ends:
    """A function that tells whether the text of the tokens so far contains one of `stops`."""
    return lambda tokens: bool(stops) and any(stop in tokenizer.decode(tokens) for stop in stops)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[
        : min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
    ]


class _Batches:
    """The batches of one generation as they pass through the stages, as many at a time as there are stages."""

    def __init__(
        self,
        texts: list[Text],
        generator: Generator,
        max_new_tokens: int,
        sampling: Sampling,
        forwards: Forwards,
        beams: Beams | None,
    ) -> None:
        self.beams = beams
        size = generator.batch_size
        self.waiting = deque(texts[first : first + size] for first in range(0, len(texts), size))
        self.generator, self.max_new_tokens, self.sampling = generator, max_new_tokens, sampling
        self.forwards = forwards
        self.passing: dict[int, _SampledBatch] = {}
        """By the number of a pass: the batch that is in it or waits for its tokens."""

    def run(self, stop_ids: Collection[int], ends: Ends, on_token: OnToken | None) -> None:
        """Generates until every text is finished."""
        # Each pass is chosen when the previous one is done: its batch may depend on tokens.
        self.forwards.run(
            self._passes(stop_ids, ends, on_token), self._forward, self._shape, ahead=0
        )

    def _passes(
        self, stop_ids: Collection[int], ends: Ends, on_token: OnToken | None
    ) -> Iterator[int]:
        """Numbers of passes; every rank takes the batches in this one order."""
        stages = self.generator.grid.pipe.size
        under_way: deque[int] = deque()
        for number in itertools.count():
            if self.waiting and len(under_way) < stages:
                batch = self._begun(self.waiting.popleft())
            elif under_way:
                last = under_way.popleft()
                batch = self.passing.pop(last)
                for text, token in batch.take(self._chosen(batch, last), stop_ids, ends):
                    if on_token is not None:
                        on_token(text.number, token)
                if batch.is_finished:
                    continue
            else:
                return
            self.passing[number] = batch
            under_way.append(number)
            yield number

    def _begun(self, texts: list[Text]) -> "_SampledBatch":
        if self.beams is None:
            return _SampledBatch(texts, self.generator, self.max_new_tokens)
        return _BeamBatch(texts, self.generator, self.max_new_tokens, self.beams)

    def _forward(self, number: int, hidden: Tensor | None) -> Tensor:
        """Runs one pass; the last stage chooses the next tokens and sends them to the others."""
        batch, axis = self.passing[number], self.generator.grid.pipe
        output = batch.advance(hidden)
        if axis.is_last:
            batch.choose(output, self.sampling)
            for place in range(axis.size - 1):
                self.forwards.mailbox.send((number, place), batch.chosen, place)
        return output

    def _shape(self, number: int) -> tuple[int, ...]:
        return *self.passing[number].column.shape, self.generator.stage.spec.hidden_size

    def _chosen(self, batch: "_SampledBatch", number: int) -> Tensor:
        """The tokens that the last stage chose in a pass."""
        axis = self.generator.grid.pipe
        if axis.is_last:
            return batch.chosen
        mailbox = self.forwards.mailbox
        shape, dtype = tuple(batch.chosen.shape), batch.chosen.dtype
        mailbox.post(number, axis.size - 1, shape, dtype)
        return mailbox.take(number)


class _SampledBatch:
    """A batch of prompts: `advance` sends the next column of tokens through this rank's stage, `take` adds the tokens
    that the last stage chose."""

    def __init__(self, texts: list[Text], generator: Generator, max_new_tokens: int) -> None:
        self.texts, self.stage, self.prefixed = texts, generator.stage, generator.prefixed
        self.tensor_axis, self.device = generator.grid.tensor, generator.device
        self.max_new_tokens = max_new_tokens
        longest = max(len(text.prompt) for text in texts)
        # [B]
        self.padding = torch.tensor(
            [longest - len(text.prompt) for text in texts], device=self.device
        )
        rows = [[0] * (longest - len(text.prompt)) + text.prompt for text in texts]
        self.start_id, self.source = self.stage.spec.start_id, 0
        capacity = longest + max_new_tokens
        if self.start_id is not None:
            rows = [[*row, self.start_id] for row in rows]
            self.source, capacity = longest, max_new_tokens
        self.column = torch.tensor(rows, device=self.device)  # [B, S], then [B, 1]
        self.seen = 0  # columns that went through
        self.cache = KeyValueCache(capacity)
        self.chosen = torch.zeros(len(texts), dtype=torch.int64, device=self.device)

    @property
    def is_finished(self) -> bool:
        return all(text.finished for text in self.texts)

    def advance(self, hidden: Tensor | None) -> Tensor:
        """One forward pass of the column, or of the previous stage's hidden states."""
        output = self.stage(self.column if hidden is None else hidden, context=self._context())
        self.seen += self.column.shape[1]
        return output

    def choose(self, output: Tensor, sampling: Sampling) -> None:
        """On the last stage: the next token of each text, from logits [B, 1, V / t]."""
        places = [(text.number, len(text.prompt) + len(text.tokens)) for text in self.texts]
        starts = [text.prompt if self.start_id is None else [self.start_id] for text in self.texts]
        held = [[*start, *text.tokens] for start, text in zip(starts, self.texts, strict=True)]
        self.chosen = choose(
            output[:, -1], self.stage.spec.vocabulary_size, self.tensor_axis, sampling, places, held
        )

    def take(
        self, chosen: Tensor, stop_ids: Collection[int], ends: Ends
    ) -> Iterator[tuple[Text, int]]:
        """Adds the tokens that the last stage chose to the unfinished texts, and yields them."""
        self.column = chosen.unsqueeze(-1)
        for text, token in zip(self.texts, chosen.tolist(), strict=True):
            if text.finished:
                continue
            text.tokens.append(token)
            if token in stop_ids or ends(text.tokens):
                text.finished = "stop"
            elif len(text.tokens) == self.max_new_tokens:
                text.finished = "length"
            yield text, token

    def _context(self) -> Context:
        """Positions count from a row's first real token; only padding attends to padding."""
        if self.start_id is not None:
            columns = torch.arange(self.source, device=self.device)
            visible = (columns >= self.padding.unsqueeze(-1))[:, None, None]
            source = 0 if self.seen else self.source
            return Context(cache=self.cache, source=source, source_visible=visible)
        length = self.column.shape[1]
        places = torch.arange(self.seen, self.seen + length, device=self.device)
        positions = (places - self.padding.unsqueeze(-1)).clamp(min=0)  # [B, S]
        columns = torch.arange(self.seen + length, device=self.device)
        real = columns >= self.padding[:, None, None]  # [B, 1, T]
        visible = (columns <= places.unsqueeze(-1)) & real  # [B, S, T]
        visible |= columns == places.unsqueeze(-1)  # a row of the softmax must not be empty
        prefixes = None
        if self.prefixed and self.seen == 0:  # the columns are the prompts
            visible, prefixes = visible | real, real.squeeze(1)
        return Context(positions, visible.unsqueeze(1), self.cache, prefixes=prefixes)


class _BeamBatch(_SampledBatch):
    """A batch of prompts with the beams of each in neighbouring rows. The last stage chooses the likeliest next tokens
    of each prompt, [prompts, 2 · beams, 3]: log probability, beam, token. From those every rank keeps the same
    hypotheses."""

    def __init__(
        self, texts: list[Text], generator: Generator, max_new_tokens: int, beams: Beams
    ) -> None:
        super().__init__(
            [text for text in texts for _ in range(beams.size)], generator, max_new_tokens
        )
        self.prompts, self.beams = texts, beams
        self.books = [Hypotheses(beams, max_new_tokens) for _ in texts]
        shape = len(texts), 2 * beams.size, 3
        self.chosen = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def choose(self, output: Tensor, sampling: Sampling) -> None:
        """On the last stage, from logits [B, 1, V / t]."""
        scores = [score for book in self.books for score in book.scores]
        found = torch.tensor(scores, dtype=torch.float64, device=self.device)
        vocabulary, axis = self.stage.spec.vocabulary_size, self.tensor_axis
        self.chosen = candidates(output[:, -1], found, vocabulary, axis, self.beams.size)

    def take(
        self, chosen: Tensor, stop_ids: Collection[int], ends: Ends
    ) -> Iterator[tuple[Text, int]]:
        """Continues with the best beams of each prompt; a finished text gets its tokens."""
        rows, column = [], []
        for number, (text, book, found) in enumerate(
            zip(self.prompts, self.books, chosen.tolist(), strict=True)
        ):
            if not text.finished:
                book.add(found, stop_ids, ends)
            if not text.finished and book.is_finished:
                text.tokens, text.finished = book.best
            rows += [number * self.beams.size + parent for parent in book.parents]
            column += [tokens[-1] if tokens else 0 for tokens in book.live]
        self.column = torch.tensor(column, device=self.device).unsqueeze(-1)
        self.cache.reorder(torch.tensor(rows, device=self.device))
        yield from ()

    @property
    def is_finished(self) -> bool:
        return all(text.finished for text in self.prompts)
