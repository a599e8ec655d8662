"""lm-evaluation-harness (the extra `eval`) on a running layout: it runs on rank 0, and all ranks answer (answers.py).

Tokens, windows and truncation are those of its `hf` model, so that a checkpoint and its export give the same figures.
`import megalite.inference.harness` needs lm-eval.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
)
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from megalite.data.chat_encoder import Marked
from megalite.errors import ConfigError
from megalite.inference.answers import Answers
from megalite.inference.sampling import Sampling

# The defaults of lm-eval, if neither model nor task has one.
DEFAULT_LENGTH, DEFAULT_NEW_TOKENS = 2048, 256


class Tasks(NamedTuple):
    """Names of tasks, and the manager that loads them."""

    names: list[Any]
    manager: Any


def load_tasks(names: Sequence[str], include_path: str | None) -> Tasks:
    """Finds tasks in lm-eval and in a folder, and reads their data once. Raises ConfigError."""
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(
                f"--tasks: {name}: no such task: must be one of lm-eval's own or of --include-path"
            )
        try:
            manager.load([name])
        except Exception as error:  # datasets raises whatever its readers do
            raise ConfigError(
                f"--tasks: {name}: its data cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return Tasks(list(names), manager)


def run(
    model: "Harness",
    tasks: Tasks,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
) -> list[dict[str, Any]]:
    """A line for each task and group: its name and lm-eval's metrics."""
    found: Any = simple_evaluate(
        model=model,
        tasks=tasks.names,
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=False,
    )
    lines = []
    for name, metrics in found["results"].items():
        shown = {key: value for key, value in metrics.items() if key not in ("name", "alias")}
        lines.append({"task": name, **shown})
    return lines


class Harness(TemplateLM):
    """The model interface of lm-eval. max_length: positions per row."""

    def __init__(self, answers: Answers, tokenizer: Any, max_length: int | None) -> None:
        super().__init__()
        self.answers = answers
        self.tokenizer = tokenizer
        self.max_length = max_length or DEFAULT_LENGTH

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokenizer's ids, without a second beginning-of-text token."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found = [tuple(likelihood) for likelihood in self.answers.ask("likelihoods", rows)]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _row(self, context: list[int], continuation: list[int]) -> Marked:
        """A row of tokens and marks, cut on the left to the model's positions plus one token."""
        marks = [0] * len(context) + [1] * len(continuation)
        return (context + continuation)[-self.max_length - 1 :], marks[-self.max_length - 1 :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probabilities of whole texts, in windows that overlap by only one token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (log_probability, _) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            sums[number] += log_probability
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop sequence; requests with equal settings are batched."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            prompts = [requests[number].args[0] for number in numbers]
            for number, text in zip(
                numbers, self._texts(prompts, requests[numbers[0]].args[1]), strict=True
            ):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _texts(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        wanted: dict[str, Any] = {**normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)}
        count = int(wanted["max_gen_toks"])
        room = self.max_length - count
        if room < 1:
            raise ConfigError(
                f"--tasks: max_gen_toks: {count}: must be below the model's {self.max_length} positions"
            )
        stops = handle_stop_sequences(wanted["until"], eos=self.tokenizer.decode(self.eot_token_id))
        temperature = float(wanted.get("temperature") or 0.0) if wanted["do_sample"] else 0.0
        chosen = {
            name: wanted[name] for name in ("top_k", "top_p") if temperature and wanted.get(name)
        }
        ids = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        stops = [stop for stop in stops if stop]
        return self.answers.ask("texts", ids, count, Sampling(temperature, **chosen), stops)
