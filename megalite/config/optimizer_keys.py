"""DeepSpeed's key `optimizer`: the update rules that megalite accepts, with their parameters, and those that it
refuses, with the reasons. Next: deepspeed_keys.py.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Rate, Section, key


class OptimizerParams(Section):
    """Parameters of the optimizer."""

    lr: float = Field(gt=0, description="Learning rate, the peak of the schedule.")
    weight_decay: Rate = Field(
        0.0, description="Weight decay; each step multiplies it by the learning rate."
    )
    betas: (
        Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
        | None
    ) = key("Adam: decay rates of the two moments; left out: [0.9, 0.999].")
    eps: float | None = Field(
        None, gt=0, description="Adam: added to the root of the second moment; left out: 1e-8."
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="SGD: momentum factor; left out: 0."
    )
    adam_w_mode: bool | None = key(
        "With type Adam: true: decoupled weight decay, as in AdamW; false: the decay is added to the gradient. Left "
        "out: true."
    )
    torch_adam: bool | None = key(
        "Use torch's Adam; false: DeepSpeed's, which is compiled at the first start, on a GPU with nvcc. "
        "Left out: true."
    )
    fused: bool | None = key(
        "With torch_adam: use the fused kernel, which reads and writes each weight once per step. Left out: true."
    )
    refused: ClassVar = {
        "max_grad_norm": "use gradient_clipping",
        "bias_correction": "it is always on",
        "amsgrad": "not available in DeepSpeed's Adam",
        "fp32_optimizer_states": "master weights and moments are kept in fp32",
    }
    neutral: ClassVar = {"bias_correction": (True,)}


ADAM: dict[str, Any] = {
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "adam_w_mode": True,
    "torch_adam": True,
    "fused": None,  # only with torch_adam
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": ADAM, "Adam": ADAM, "SGD": {"momentum": 0.0}}
"""The parameters of each optimizer besides lr and weight_decay, with their defaults."""
REFUSED_OPTIMIZERS = {
    "Muon": "DeepSpeed's orthogonalizes a tensor rank's slice of a matrix instead of the whole matrix, and with ZeRO "
    "clips the update instead of the gradient: results would depend on the layout",
    "Lion": "DeepSpeed's moves weights whose gradient is 0, such as the embedding of an unseen token, by a whole step",
    "Adagrad": "DeepSpeed drops its parameter groups with ZeRO: norms and biases would decay",
    "Lamb": "it needs norms of whole tensors, but gets parts of them with ZeRO",
}


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        rule = f"must be one of {', '.join(OPTIMIZERS)}"
        for known, why in REFUSED_OPTIMIZERS.items():
            if known.lower() == name.lower():
                rule = f"{rule}: {why}"
        raise PydanticCustomError("optimizer", "{rule}", {"rule": rule})
    return name


class Optimizer(Section):
    """`optimizer`"""

    type: Annotated[str, AfterValidator(_optimizer)] = Field(
        description="The update rule: `AdamW`, `Adam`, or torch's `SGD`."
    )
    params: OptimizerParams
    refused: ClassVar = {"legacy_fusion": "it belongs to fp16 and LAMB; leave it out"}
