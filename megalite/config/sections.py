"""megalite's own keys, which are under `"megalite"` in the JSON, each with its meaning and unit.

Batch sizes, precision, ZeRO, optimizer, scheduler and clipping are DeepSpeed's keys (`deepspeed_keys.py`). Time limits
and faults are in `limits.py`, rules between several keys in `rules.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.limits import Faults, Limits
from megalite.config.masks import Masked
from megalite.config.objectives import (
    Classes,
    Pairs,
    SpanLengths,
    Spans,
    span_lengths,
)
from megalite.config.parallel_keys import Parallel
from megalite.config.router_section import RouterSection
from megalite.config.section import Counter, Positive, Section, Share, broken

Text = Annotated[str, Field(min_length=1)]


def _model(value: Any) -> Any:
    if isinstance(value, dict):
        if not isinstance(value.get("model_type"), str):
            raise PydanticCustomError(
                "model", 'must have "model_type", as in a Hugging Face config'
            )
        return value
    if isinstance(value, str) and value:
        return value
    raise PydanticCustomError("model", "must be a Hugging Face config object or the folder of one")


def _source(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, dict | Source):
        return value
    raise PydanticCustomError("source", 'must be a prefix or {{"path": prefix, "weight": number}}')


class Source(Section):
    """One corpus of a blend."""

    path: Text = Field(
        description="Prefix of `prefix.bin` and `prefix.idx` (Megatron's indexed format)."
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the samples, relative to the other entries."
    )
    split: list[Share] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Part of the corpus to use, `[from, to]` as fractions of its sequences, such as `[0, 0.99]`; "
        "left out: all.",
    )


def _objective(value: Any) -> Any:
    if isinstance(
        value, dict
    ):  # pydantic includes the errors of nested sections under their own keys
        kinds = {"classes": Classes, "source_length": Pairs, "span_corruption": Spans}
        kind = next((kinds[key] for key in kinds if key in value), Masked)
        return kind.model_validate(value)
    if value in ("causal", "prefix") or isinstance(value, Masked | Classes | Pairs | Spans):
        return value
    raise PydanticCustomError(
        "objective",
        'must be "causal", "prefix" or an object such as {{"masked": 0.15}} or {{"classes": ["bad", "good"]}}',
    )


Sources = list[Annotated[Source, BeforeValidator(_source)]]


class Data(Section):
    """Corpora, samples and objective."""

    tokenizer: Text | None = Field(
        None, description="Folder of the tokenizer; may be left out if no text is decoded."
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens in a sample.")
    train: Sources = Field(
        min_length=1,
        description='Corpora to train on: prefixes, or `{"path": prefix, "weight": number}`.',
    )
    valid: Sources = Field(
        [], description="Corpora to evaluate on, in the same form; empty: no evaluation."
    )
    samples: Literal["windows", "packed", "padded"] = Field(
        "windows",
        description="`windows`: the corpus cut into pieces of sequence_length tokens. For fine-tuning, whole "
        "documents: `packed`, as many per sample as fit, or `padded`, one per sample.",
    )
    loss: Literal["all", "marked"] | None = Field(
        None,
        description="`all`: all tokens count in the loss; `marked`: those marked in `prefix.mask`, which "
        "tools/preprocess_data.py --chat writes; left out: all, and an existing `prefix.mask` is an error.",
    )
    objective: Annotated[
        Literal["causal", "prefix"] | Masked | Classes | Pairs | Spans, BeforeValidator(_objective)
    ] = Field(
        "causal",
        description="`causal`: each token is predicted from those before it. `prefix`: only marked tokens are "
        "predicted; the tokens before them, a document's prompt, attend to each other in both directions "
        "(docs/translation.md). "
        'For encoders, masked language modelling, `{"masked": 0.15, "keep": 0.1, "swap": 0.1}`; evaluation uses the '
        'same masks every time (docs/encoders.md). `{"classes": ["negative", "positive"]}`: a text classifier, '
        "whose head replaces the model's own (docs/classification.md). For encoder-decoders, pairs of source and "
        'target, `{"source_length": 64}`, or span corruption, `{"span_corruption": 0.15, "mean_span": 3}` '
        "(docs/translation.md).",
    )
    order: Literal["shuffled", "megatron"] = Field(
        "shuffled",
        description="`shuffled`: a new order of the samples in each epoch, computed without index tables. "
        "`megatron`: exactly the samples and the blend of Megatron-LM's GPTDataset with the same seed.",
    )
    megatron_samples: Positive | None = Field(
        None,
        description="Number of samples that the order `megatron` is built for, Megatron-LM's train_iters × "
        "global_batch_size; left out: megalite.train.steps × train_batch_size of the run's first start.",
    )
    reset_attention: bool = Field(
        False,
        description="Keep documents apart: attention and positions restart at each document, and a document's "
        "last token does not predict the next document's first.",
    )
    eod_mask_loss: bool = Field(
        False,
        description="Exclude predictions made from the tokenizer's end-of-document token from the loss.",
    )

    @property
    def ahead(self) -> int:
        """Number of tokens that a sample needs after its last position, for the label there."""
        return 1 if isinstance(self.objective, str) else 0

    @property
    def counted_share(self) -> float:
        """Approximate share of the positions that count in the loss, by the objective alone."""
        match self.objective:
            case Masked() as masked:
                return sum(masked.ends) / 2
            case Classes():
                return 1 / self.sequence_length
        return 1 - self.source_length / self.sequence_length

    @property
    def spans(self) -> SpanLengths | None:
        """Lengths in samples of span corruption; None for other objectives, and if no text fits."""
        if not isinstance(self.objective, Spans):
            return None
        return span_lengths(self.objective, self.sequence_length)

    @property
    def source_length(self) -> int:
        """Number of tokens at the start of a sample that are an encoder-decoder's source; 0 if there is no source."""
        if isinstance(self.objective, Pairs):
            return self.objective.source_length
        return 0 if self.spans is None else self.spans.source

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels of texts; empty if tokens are predicted."""
        return tuple(self.objective.classes) if isinstance(self.objective, Classes) else ()


class BatchRamp(Section):
    """A global batch that grows to train_batch_size, as with Megatron-LM's --rampup-batch-size. A step's size is a
    function of the samples consumed before it."""

    start: Positive = Field(description="Samples of the first step.")
    increment: Positive = Field(
        description="Samples added at each increment. `start` and `increment` must be multiples of micro-batch × data "
        "axis."
    )
    samples: Positive = Field(description="Samples over which the increments are spread evenly.")


class Init(Section):
    """The initial weights of a new run: normally distributed, by (seed, name); norms are 1 and biases 0."""

    std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of matrices; left out: the model config's initializer_range.",
    )
    embedding_std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of token and learned position embeddings, and of a tied head; left out: the "
        "same as std.",
    )
    depth_scaled: bool | None = Field(
        None,
        description="Whether projections that write to the residual stream (attention's output, the MLP's down "
        "projection) use std / sqrt(2 × layers), as in GPT-2 and Megatron-LM; left out: as in transformers, true for "
        "gpt2 and modernbert only.",
    )


class ParameterGroup(Section):
    """Optimizer settings for some tensors."""

    match: Text = Field(
        description="Full names, with `*`, `?` and `[…]` as in a shell: `layers.*.mlp.*`, `embedding.*`. The first "
        "entry that matches a name applies to it; an entry that applies to no tensor is an error."
    )
    lr_ratio: float = Field(
        1.0,
        ge=0,
        description="Learning rate, as a multiple of the run's; 0: the tensors are frozen.",
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="Left out: optimizer.params.weight_decay, and 0 for norms and biases.",
    )


class EarlyStop(Section):
    """Early stopping: the run ends if the validation loss no longer falls; docs/finetuning.md."""

    patience: Positive = Field(
        description="Number of consecutive evaluations without a lower validation loss after which the run ends, with "
        "a checkpoint of that step."
    )
    min_delta: float = Field(
        0.0, ge=0, description="A loss counts as lower only if it falls by more than this."
    )


class Train(Section):
    """The length of the run, its starting weights, and what it saves."""

    steps: Positive | None = Field(
        None, description="Optimizer steps of the whole run; give `steps` or `epochs`."
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the corpus, in place of `steps`, which is computed from it at the start, printed and "
        "written to `config.json`. For a single corpus, not for a blend.",
    )
    seed: int = Field(
        1234, ge=0, lt=2**63, description="Seed of the weights, dropout and the order of samples."
    )
    run_dir: Text = Field(
        description="Run folder. If it already holds a checkpoint, training resumes from it. Relative to the "
        "working directory."
    )
    load: Text | None = Field(
        None,
        description="Weights to start a new run from: a run folder, a checkpoint or a Hugging Face folder.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] | Positive = Field(
        "none",
        description="What the backward pass recomputes instead of storing it. `selective`: core attention; `full`: "
        "everything in a layer but its input; a number n: everything in n layers but the input of the first.",
    )
    deterministic: bool = Field(
        False,
        description="On GPUs, use deterministic kernels and collectives, so that a run that is repeated or resumed on "
        "the same GPUs is identical bit for bit, at some cost in speed; an operation without such a kernel is an "
        "error. Runs on CPUs are always deterministic.",
    )
    compile: bool = Field(
        False,
        description="Let torch.compile fuse rotary embeddings and the product in gated MLPs into one kernel each, "
        "forward and backward, and on GPUs also dropout masks; each rank compiles at its first step, which needs a "
        "C++ compiler; on GPUs also Triton, a C compiler and Python's headers. Results differ by rounding.",
    )
    batch_ramp: BatchRamp | None = Field(
        None,
        description="A global batch that starts smaller and grows with the samples consumed; left out: constant.",
    )
    parameter_groups: list[ParameterGroup] = Field(
        [],
        description="Learning rate and weight decay by tensor name; norms and biases have no weight decay unless an "
        "entry sets it.",
    )
    init: Init = Field(
        default_factory=lambda: Init.model_validate({}),
        description="The initial weights of a new run.",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the z-loss, the squared logarithm of the softmax denominator, in each token's training "
        "loss.",
    )
    router: RouterSection | None = Field(
        None,
        description="For a model with experts; left out: the defaults of its keys.",
    )
    eval_interval: Counter = Field(
        50, description="Steps between two evaluations; the last step is also evaluated; 0: never."
    )
    eval_steps: Positive | Literal["all"] = Field(
        4,
        description="Global batches per evaluation, at most the whole validation corpora; `all`: the whole corpora, "
        "each sample once.",
    )
    keep_best: bool = Field(
        False,
        description="Save a checkpoint after each evaluation with the lowest validation loss so far. The file "
        "`checkpoints/best` names the newest of these, which `keep_checkpoints` does not remove.",
    )
    early_stop: EarlyStop | None = Field(
        None, description="End the run if the validation loss no longer falls; left out: never."
    )
    checkpoint_interval: Counter = Field(
        100,
        description="Steps between two checkpoints; the last step is always saved; 0: only the last step.",
    )
    checkpoint_copy_gib: float | None = Field(
        None,
        ge=0,
        description="Most memory in GiB that a rank may use for a copy of the checkpoint, so that training continues "
        "while it is written. If a rank needs more, training waits until the files are written; 0: always wait. Left "
        "out: half of the node's free memory, divided among its ranks.",
    )
    keep_checkpoints: Counter = Field(
        3, description="Number of newest checkpoints to keep, in addition to the best; 0: all."
    )
    log_interval: Positive = Field(
        1,
        description="Steps between two lines of progress if the output is not a terminal; `metrics.jsonl` has every "
        "step.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files to the run folder.")
    trackers: list[Text] = Field(
        [],
        description="Experiment trackers in addition to TensorBoard, such as `wandb`, `trackio`, `mlflow`; "
        "docs/watching.md.",
    )
    sample_prompts: list[Text] = Field(
        [], description="Texts that the model continues at each evaluation; docs/watching.md."
    )
    sample_tokens: Positive = Field(48, description="Most new tokens for each sample prompt.")
    calibration: Text | None = Field(
        None,
        description="File that tools/benchmark_step.py --calibrate wrote on this machine, for the predicted step time "
        "in `--check` and beside the first steps; left out: figures of a known GPU. docs/planning.md.",
    )
    trace_steps: list[Positive] = Field(
        [],
        description="Steps whose timeline of all ranks is written to `trace.json`; docs/watching.md.",
    )
    limits: Limits = Field(
        default_factory=lambda: Limits.model_validate({}),
        description="Time limits, for a run that hangs.",
    )
    faults: Faults = Field(
        default_factory=lambda: Faults.model_validate({}),
        description="What to do about steps and ranks that go wrong.",
    )

    @property
    def last_step(self) -> int:
        """Steps of the whole run. Raises ConfigError if they depend on epochs and no corpus was read."""
        if self.steps is None:
            rule = "only training reads the corpus, on which the steps depend: give megalite.train.steps instead"
            raise broken("megalite.train.epochs", self.epochs, rule)
        return self.steps


class Megalite(Section):
    """The section `"megalite"`."""

    model: Annotated[dict[str, Any] | str, BeforeValidator(_model)] = Field(
        description='A Hugging Face config, `{"model_type": "llama", …}`, or a folder that contains a `config.json`.'
    )
    parallel: Parallel = Field(
        default_factory=lambda: Parallel.model_validate({}), description="The grid of ranks."
    )
    data: Data
    train: Train
