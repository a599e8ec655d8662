"""megalite from Python: `megalite.load` for a trained model in this process, `megalite.train` for a run.

    model = megalite.load("runs/my")
    model.generate("Once upon a time", max_new_tokens=40, temperature=0.8)
    model.loss("Once upon a time there was a fox.")

Here the whole model is on one device. For a model that needs several ranks, use `launcher/generate.py` and
`launcher/evaluate.py`.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.saved_bias import set_router_bias
from megalite.checkpoint.weights import load_onto
from megalite.config import load_config
from megalite.data.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    continuation,
    load_tokenizer,
    prompt_ids,
)
from megalite.errors import CheckpointError, ConfigError, MegaliteError
from megalite.hub.carried import tokenizer_of
from megalite.hub.sources import Weights, open_weights, prompts_both_ways, resolve_weights
from megalite.inference.generate import Generator
from megalite.inference.likelihood import likelihoods
from megalite.inference.prepare import check_decoder, stop_ids_for
from megalite.inference.sampling import Sampling
from megalite.inference.texts import Growing, as_sources, check_ids
from megalite.inputs import reading
from megalite.model.families import read_spec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid
from megalite.pipeline.pipeline_plan import inference_cut
from megalite.training.pretraining import prepare

Message = dict[str, Any]
"""`{"role": "user" | "assistant" | "system" | "tool", "content": "…"}`; an assistant's may also have `tool_calls`"""
OnText = Callable[[str], None]
"""Called with each new piece of a text as it is generated."""


def load(folder: str | Path, dtype: str = "float32", device: str | None = None) -> "Model":
    """Loads the model of a run folder (its newest complete checkpoint), a checkpoint or a Hugging Face folder.
    `RUN/checkpoints/best` is the checkpoint with the lowest validation loss, if the run keeps it.

    dtype: "float32", "bfloat16" or "float16", for weights and activations. device: a torch device; None: the first
    GPU, or the CPU if there is none. Raises CheckpointError or ConfigError if the folder cannot be used.
    """
    with reading(folder, CheckpointError):
        path = resolve_weights(folder)
        weights = open_weights(path)
        spec = read_spec(weights.model)
        with torch.device("meta"):
            stage = Stage(spec, Grid(), inference_cut(spec, 1)).eval()
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        load_onto(weights.read, stage, getattr(torch, dtype), chosen)
        set_router_bias(stage, weights.state, chosen)
    return Model(path, weights, stage)


@dataclass(repr=False)
class Model:
    """A trained model on one device, for use from Python. folder: the folder of its weights."""

    folder: Path
    weights: Weights
    stage: Stage

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.stage.parameters())
        return f"<megalite.Model {self.weights.model['model_type']}, {count:,} parameters, {self.folder}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the weights. Raises CheckpointError if there is none."""
        if self._tokenizer is None:
            folder = tokenizer_of(self.weights)
            if folder is None:
                raise CheckpointError(f"{self.folder}: the checkpoint has no tokenizer")
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 1234,
        on_text: OnText | None = None,
        **more: Any,
    ) -> str:
        """The text that continues a prompt, without the prompt.

        temperature: 0 is greedy decoding. more: other fields of `Sampling`, such as `repetition_penalty` and `min_p`.
        on_text: called with each piece of the text as it is generated. The same arguments give the same text.
        Raises ConfigError if an argument is invalid.
        """
        sampling = Sampling(temperature, top_k, top_p, seed, **more)
        return self._continued(
            prompt_ids(self.tokenizer, prompt), max_new_tokens, sampling, on_text
        )

    def chat(
        self,
        messages: str | Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 1234,
        on_text: OnText | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """The assistant's answer to a conversation, or to a user's first message given as a string.

        The tokenizer's chat template renders the messages, and `tools` if it supports them; the other arguments are
        those of `generate`. Raises ConfigError if the tokenizer has no chat template or the template rejects the
        messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        answered = any(message.get("role") == "assistant" for message in messages)
        if answered and prompts_both_ways(self.weights.state):
            rule = 'a model trained with megalite.data.objective "prefix" answers one message only'
            raise ConfigError(f"messages: contain an answer: {rule}: begin a new conversation")
        sampling = Sampling(temperature, top_k, top_p, seed, **more)
        ids = self.chat_ids(messages, tools)
        return self._continued(ids, max_new_tokens, sampling, on_text)

    def chat_ids(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins. Raises ConfigError as in `chat`."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.inner.chat_template:
            raise ConfigError(
                f"{self.folder}: the tokenizer has no chat template: chat needs one; generate does not"
            )
        try:
            text = tokenizer.inner.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program, which can raise anything
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"messages: rejected by the chat template: {reason}") from None
        return tokenizer.inner(text, add_special_tokens=False, split_special_tokens=False)[
            "input_ids"
        ]

    @property
    def has_source(self) -> bool:
        """Whether the model is an encoder-decoder: a prompt is its source, and a text its target."""
        return self.stage.spec.stacks is not None

    def loss(self, text: str | Sequence[int]) -> float:
        """Mean cross-entropy of a text (or of token ids), each token predicted from all before it, in nats per token.

        The first token is not predicted and does not count. Raises ConfigError for a text of fewer than two tokens.
        """
        ids = prompt_ids(self.tokenizer, text) if isinstance(text, str) else list(text)
        check_decoder(self.stage.spec, str(self.folder), "this")
        if len(ids) < 2:
            raise ConfigError(f"text: has {len(ids)} tokens: must have at least 2")
        self._check(ids)
        most = self.stage.spec.max_positions
        if most is not None and len(ids) - 1 > most:
            rule = f"must be at most the model's max_position_embeddings {most} + 1"
            raise ConfigError(f"text: has {len(ids)} tokens: {rule}")
        # Every token is scored, so that none of them belongs to a prompt, which some models see in both directions.
        (found,) = likelihoods(self.stage, Grid(), [(ids, [1] * len(ids))])
        return -found.log_probability / (len(ids) - 1)

    def _continued(
        self, ids: list[int], max_new_tokens: int, sampling: Sampling, on_text: OnText | None
    ) -> str:
        ids, is_source = as_sources(self.stage.spec, self.tokenizer, [ids])[0], self.has_source
        self._check(ids)
        ends = stop_ids_for(self.weights, self.tokenizer)

        def text_of(tokens: Sequence[int]) -> str:
            return continuation(self.tokenizer, ids, tokens, ends, is_source)

        growing = None if on_text is None else Growing(text_of, on_text)
        on_token = None if growing is None else growing.add
        prefixed = prompts_both_ways(self.weights.state)
        generator = Generator(self.stage, Grid(), batch_size=1, prefixed=prefixed)
        (text,) = generator.generate([ids], max_new_tokens, sampling, ends, on_token)
        whole = text_of(text.tokens)
        if growing is not None:
            growing.end(whole)
        return whole

    def _check(self, ids: Sequence[int]) -> None:
        check_decoder(self.stage.spec, str(self.folder), "this", sources=True)
        check_ids(self.stage.spec, [ids])


def train(
    config: str | Path | dict[str, Any], overrides: Sequence[str] = (), ranks: int = 1
) -> Path:
    """Trains with a config in separate processes, prints their output, and returns the run folder.

    config: a file, or its content as a dict. overrides: `KEY=VALUE` as on the command line. ranks: number of processes
    on this machine; each takes one GPU if there are GPUs. If the run folder already holds a checkpoint, training
    resumes from it. Ctrl-C (or a notebook's stop button) saves a checkpoint and raises KeyboardInterrupt. Raises
    UserError for a mistake in the config, before anything starts, and MegaliteError if the run fails.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(config, dict):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="megalite_"))
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
        else:
            path = Path(config)
        prepare(str(path), list(overrides), ranks)
        words = ["pretrain", "--deepspeed_config", str(path), *overrides]
        starting = ["run", "--num_gpus", str(ranks)] if ranks > 1 else []
        _run([sys.executable, "-u", "-m", "megalite", *starting, *words])
        return Path(load_config(path, overrides).train.run_dir)


def _run(command: list[str]) -> None:
    """Runs a command until it ends and prints its output from this process: a notebook shows no other process's."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
    except BaseException:
        process.send_signal(signal.SIGINT)
        print(process.communicate()[0], end="", flush=True)
        raise
    if code := process.wait():
        raise MegaliteError(
            f"training ended with exit code {code}: see the last lines of its output"
        )
