"""megalite's own keys: what is under `"megalite"` in the JSON, each with its meaning and unit.

Batch sizes, precision, ZeRO, optimizer, scheduler and clipping are not here: DeepSpeed's keys own them
(`deepspeed_keys.py`). Limits of time and faults are in `limits.py`, rules that tie several keys together in `rules.py`.
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
from megalite.config.router_section import Router
from megalite.config.section import Counter, Positive, Section, Share, broken

Text = Annotated[str, Field(min_length=1)]


def _model(value: Any) -> Any:
    if isinstance(value, dict):
        if not isinstance(value.get("model_type"), str):
            raise PydanticCustomError(
                "model", 'must hold "model_type", as in a Hugging Face config'
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
        description="Part of the corpus that is used, `[from, to]` as shares of its sequences, such as "
        "`[0, 0.99]`; left out: all.",
    )


def _objective(value: Any) -> Any:
    if isinstance(value, dict):  # pydantic takes their errors in, at their places
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
    """What is read."""

    tokenizer: Text | None = Field(
        None, description="Folder of the tokenizer; may be left out where no text is decoded."
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
        description="`windows`: the corpus in pieces of sequence_length. For fine-tuning, whole documents: `packed`, "
        "as many in a sample as fit, or `padded`, one a sample.",
    )
    loss: Literal["all", "marked"] | None = Field(
        None,
        description="`all` tokens count in the loss, or those `marked` by `prefix.mask`, as tools/preprocess_data.py "
        "--chat writes it; left out: all, and an existing `prefix.mask` is refused.",
    )
    objective: Annotated[
        Literal["causal", "prefix"] | Masked | Classes | Pairs | Spans, BeforeValidator(_objective)
    ] = Field(
        "causal",
        description="`causal`: each token is predicted from those before it. `prefix`: so are marked tokens, while "
        "those of a document's prompt, the tokens before the marked ones, see each other both ways "
        "(docs/translation.md). "
        'For encoders masked language modelling, `{"masked": 0.15, "keep": 0.1, "swap": 0.1}`; evaluation uses the '
        'same masks every time (docs/encoders.md). `{"classes": ["negative", "positive"]}`: a classifier of texts, '
        "whose head replaces the model's own (docs/classification.md). For encoder-decoders pairs of source and "
        'target, `{"source_length": 64}`, or span corruption, `{"span_corruption": 0.15, "mean_span": 3}` '
        "(docs/translation.md).",
    )
    order: Literal["shuffled", "megatron"] = Field(
        "shuffled",
        description="`shuffled`: windows of the files in a new order each epoch, computed, with no tables. "
        "`megatron`: exactly the samples and the blend of Megatron-LM's GPTDataset under the same seed.",
    )
    megatron_samples: Positive | None = Field(
        None,
        description="Samples that the order `megatron` is computed for, Megatron-LM's train_iters × global_batch_size; "
        "left out: megalite.train.steps × train_batch_size of the run's first start.",
    )
    reset_attention: bool = Field(
        False,
        description="Keep documents apart: attention and positions restart at each document, and a document's "
        "last token does not predict the next document's first.",
    )
    eod_mask_loss: bool = Field(
        False,
        description="Leave out of the loss what is predicted from the tokenizer's end-of-document token.",
    )

    @property
    def ahead(self) -> int:
        """Tokens that a sample needs after its last position: the label there."""
        return 1 if isinstance(self.objective, str) else 0

    @property
    def counted_share(self) -> float:
        """About which share of the positions counts in the loss, by the objective alone."""
        match self.objective:
            case Masked() as masked:
                return sum(masked.ends) / 2
            case Classes():
                return 1 / self.sequence_length
        return 1 - self.source_length / self.sequence_length

    @property
    def spans(self) -> SpanLengths | None:
        """Lengths in samples of span corruption; None for other objectives, and where none fits."""
        if not isinstance(self.objective, Spans):
            return None
        return span_lengths(self.objective, self.sequence_length)

    @property
    def source_length(self) -> int:
        """Tokens of a sample that are the source of an encoder-decoder, the first ones; 0 where there is none."""
        if isinstance(self.objective, Pairs):
            return self.objective.source_length
        return 0 if self.spans is None else self.spans.source

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels of texts; empty where tokens are predicted."""
        return tuple(self.objective.classes) if isinstance(self.objective, Classes) else ()


class BatchRamp(Section):
    """A global batch that grows to train_batch_size, as with Megatron-LM's --rampup-batch-size. How many samples a step
    takes is a function of those consumed before it."""

    start: Positive = Field(description="Samples of the first step.")
    increment: Positive = Field(
        description="Samples added at each rise. Both must be multiples of micro-batch × data axis."
    )
    samples: Positive = Field(description="Samples over which the rises are spread evenly.")


class Init(Section):
    """The weights that a new run starts from: normal, by (seed, name); norms are 1 and biases 0."""

    std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of matrices; left out: the model config's initializer_range.",
    )
    embedding_std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of token and learned position embeddings, and so of a tied head; left out: as "
        "std.",
    )
    depth_scaled: bool | None = Field(
        None,
        description="Projections that write to the residual stream (attention's output, the MLP's down) take "
        "std / sqrt(2 × layers), as GPT-2 and Megatron-LM do; left out: as the family does in transformers, which is "
        "true for gpt2 and modernbert alone.",
    )


class ParameterGroup(Section):
    """Settings of the optimizer for some tensors."""

    match: Text = Field(
        description="Full names, with `*`, `?` and `[…]` as in a shell: `layers.*.mlp.*`, `embedding.*`. The first "
        "entry that matches a name applies to it; an entry that applies to no tensor is refused."
    )
    lr_ratio: float = Field(
        1.0, ge=0, description="Learning rate, as a multiple of the run's; 0: not trained."
    )
    weight_decay: float | None = Field(
        None,
        ge=0,
        description="Left out: optimizer.params.weight_decay, and 0 for norms and biases.",
    )


class EarlyStop(Section):
    """The run ends where the validation loss no longer falls; docs/finetuning.md."""

    patience: Positive = Field(
        description="Evaluations in a row without a lower validation loss after which the run ends, with a checkpoint "
        "of that step."
    )
    min_delta: float = Field(
        0.0, ge=0, description="A loss counts as lower only if it falls by more than this."
    )


class Train(Section):
    """How long, from where, and what is kept."""

    steps: Positive | None = Field(
        None, description="Optimizer steps of the whole run; give these or `epochs`."
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Passes over the corpus, in place of `steps`: the start computes `steps` from it, prints it and "
        "writes it to `config.json`. For one corpus, not for a blend.",
    )
    seed: int = Field(
        1234, ge=0, lt=2**63, description="Seed of the weights, the dropout and the sample order."
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
        description="What backward computes again instead of keeping it. `selective`: the core of attention; "
        "`full`: all of a layer but its input; a number n: all of n layers but the input of the first.",
    )
    deterministic: bool = Field(
        False,
        description="On GPUs: kernels and collectives whose sums have one order, so that a run and its repetition or "
        "resumption on the same GPUs are equal to the bit, at some cost in speed; an operation without such a kernel "
        "is an error. Runs on a CPU are always so.",
    )
    compile: bool = Field(
        False,
        description="Let torch.compile make one kernel of rotary positions and one of a gated MLP's product, forward "
        "and backward, and on GPUs one of dropout's masks; each rank compiles at its first step, which needs a C++ "
        "compiler. Results differ by rounding.",
    )
    batch_ramp: BatchRamp | None = Field(
        None,
        description="A global batch that starts smaller and grows with the samples consumed; left out: constant.",
    )
    parameter_groups: list[ParameterGroup] = Field(
        [],
        description="Learning rate and weight decay by names; norms and biases do not decay unless an entry says so.",
    )
    init: Init = Field(
        default_factory=lambda: Init.model_validate({}),
        description="The weights that a new run starts from.",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared logarithm of the softmax's denominator, added to a token's training loss.",
    )
    router: Router | None = Field(
        None,
        description="For a model with experts; left out: the defaults of its keys.",
    )
    eval_interval: Counter = Field(
        50, description="Steps between two evaluations; the last step has one too; 0: never."
    )
    eval_steps: Positive = Field(4, description="Global batches in an evaluation.")
    keep_best: bool = Field(
        False,
        description="Save a checkpoint after each evaluation with the lowest validation loss so far. The file "
        "`checkpoints/best` names the newest of these, which `keep_checkpoints` does not remove.",
    )
    early_stop: EarlyStop | None = Field(
        None, description="End the run where the validation loss no longer falls; left out: never."
    )
    checkpoint_interval: Counter = Field(
        100,
        description="Steps between two checkpoints; 0: at the last step only, which always has one.",
    )
    checkpoint_copy_gib: float | None = Field(
        None,
        ge=0,
        description="Most memory that a rank may use for a copy of the checkpoint, so that training continues while it "
        "is written. If a rank needs more, training waits for the files; 0: always. Left out: half of the node's free "
        "memory, divided among its ranks.",
    )
    keep_checkpoints: Counter = Field(
        3, description="Newest checkpoints that are kept, beside the best; 0: all."
    )
    log_interval: Positive = Field(
        1,
        description="Steps between two lines of progress where there is no terminal; `metrics.jsonl` has all.",
    )
    tensorboard: bool = Field(
        True, description="Write TensorBoard event files into the run folder."
    )
    trackers: list[Text] = Field(
        [],
        description="Such as `wandb`, `trackio`, `mlflow`, beside TensorBoard; docs/watching.md.",
    )
    sample_prompts: list[Text] = Field(
        [], description="Texts that the model continues at each evaluation; docs/watching.md."
    )
    sample_tokens: Positive = Field(48, description="Most new tokens for each of them.")
    calibration: Text | None = Field(
        None,
        description="File that tools/benchmark_step.py --calibrate wrote on this machine, by which a step's time is "
        "predicted in `--check` and beside the first steps; left out: figures of a known GPU. docs/planning.md.",
    )
    trace_steps: list[Positive] = Field(
        [],
        description="Steps whose timeline of all ranks goes into `trace.json`; docs/watching.md.",
    )
    limits: Limits = Field(
        default_factory=lambda: Limits.model_validate({}),
        description="Limits of time, for a run that hangs.",
    )
    faults: Faults = Field(
        default_factory=lambda: Faults.model_validate({}),
        description="What is done about steps and ranks that go wrong.",
    )

    @property
    def last_step(self) -> int:
        """Steps of the whole run. Raises ConfigError where they follow from epochs, and no corpus was read."""
        if self.steps is None:
            rule = "only training reads the corpus, from which the steps follow: give megalite.train.steps instead"
            raise broken("megalite.train.epochs", self.epochs, rule)
        return self.steps


class Megalite(Section):
    """The section `"megalite"`."""

    model: Annotated[dict[str, Any] | str, BeforeValidator(_model)] = Field(
        description='A Hugging Face config, `{"model_type": "llama", …}`, or a folder with its `config.json`.'
    )
    parallel: Parallel = Field(
        default_factory=lambda: Parallel.model_validate({}), description="The grid of ranks."
    )
    data: Data
    train: Train
