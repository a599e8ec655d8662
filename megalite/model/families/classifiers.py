"""Text classifiers: the head of transformers' XForSequenceClassification in place of a family's language model head.

A Hugging Face config is a classifier's if its `architectures` names such a class. Decoders classify a text by its last
token; BERT, RoBERTa and (if the config says so) ModernBERT by the first, which is [CLS].
"""

from dataclasses import replace
from typing import Any

from megalite.config.objectives import Classified
from megalite.errors import ConfigError
from megalite.model.families.common import KEY, HFTensor, choose, require, tensors, written
from megalite.model.spec import ClassifierSpec, TransformerSpec

ENDING = "ForSequenceClassification"
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "gpt2": "GPT2",
    "gptj": "GPTJ",
    "gpt_neox": "GPTNeoX",
    "phi": "Phi",
    "bert": "Bert",
    "roberta": "Roberta",
    "modernbert": "ModernBert",
}
"""The first part of the class name, for each family."""
_DECODERS = {"classifier.output.weight": HFTensor("score.weight")}
TENSORS: dict[str, dict[str, HFTensor]] = {
    "bert": tensors({"classifier.dense": "bert.pooler.dense", "classifier.output": "classifier"}),
    "roberta": tensors(
        {"classifier.dense": "classifier.dense", "classifier.output": "classifier.out_proj"}
    ),
    "modernbert": tensors({"classifier.output": "classifier"}),
}
LEAST, MOST = 2, 256  # labels; a corpus stores a label in one byte


def tensors_of(family: str) -> dict[str, HFTensor]:
    """The table of a classifier's own tensors in the family's files."""
    return TENSORS.get(family, _DECODERS)


def make_classifier(config: Any, section: Classified) -> None:
    """Turns a transformers config into a classifier's, in place."""
    _check_family(config)
    config.architectures = [CLASSES[config.model_type] + ENDING]
    config.id2label = dict(enumerate(section.classes))
    config.label2id = {name: number for number, name in enumerate(section.classes)}


def _check_family(config: Any) -> None:
    if config.model_type not in CLASSES:
        names = ", ".join(CLASSES)
        raise ConfigError(
            f"{KEY}.model_type: {config.model_type!r}: a classifier must be one of {names}"
        )


def is_classifier(config: Any) -> bool:
    """Whether a transformers config is a classifier's."""
    names = config.architectures
    return isinstance(names, list) and any(
        isinstance(name, str) and name.endswith(ENDING) for name in names
    )


def classified(config: Any, spec: TransformerSpec) -> TransformerSpec:
    """The spec of a classifier's config, from the spec of its family's language model."""
    _check_family(config)
    require(config, "problem_type", None, "single_label_classification")
    names = [config.id2label[number] for number in sorted(config.id2label)]
    if not LEAST <= len(names) <= MOST or len(set(names)) < len(names):
        rule = f"must have {LEAST} to {MOST} labels, each once"
        raise ConfigError(f"{KEY}.id2label: {written(config.id2label)}: {rule}")
    return replace(
        spec,
        classifier=_head(config, tuple(map(str, names))),
        tied=False,
        head_bias=False,
        head_transform=spec.head_transform if spec.family == "modernbert" else None,
    )


def _head(config: Any, labels: tuple[str, ...]) -> ClassifierSpec:
    match config.model_type:
        case "bert" | "roberta":
            rate = config.classifier_dropout
            rate = config.hidden_dropout_prob if rate is None else rate
            dense_rate = rate if config.model_type == "roberta" else 0.0
            return ClassifierSpec(labels, "first", True, True, rate, dense_rate)
        case "modernbert":
            pooling = choose(config, "classifier_pooling", {"cls": "first", "mean": "mean"})
            return ClassifierSpec(labels, pooling, dropout=config.classifier_dropout)
    return ClassifierSpec(labels, "last", bias=False)
