"""DeepSpeed's key `optimizer`: the update rules that megalite takes, with their parameters, and those that it refuses,
with why. Next: deepspeed_keys.py.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megalite.config.section import Rate, Section, key


class OptimizerParams(Section):
    """Parameters of the optimizer."""

    lr: float = Field(gt=0, description="Learning rate, the highest of the schedule.")
    weight_decay: Rate = Field(0.0, description="Decay of the weights, times the learning rate.")
    betas: (
        Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
        | None
    ) = key("Adam: decay of the two moments; left out: [0.9, 0.999].")
    eps: float | None = Field(
        None, gt=0, description="Adam: added to the root of the second moment; left out: 1e-8."
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="SGD: decay of the momentum; left out: 0, none."
    )
    adam_w_mode: bool | None = key(
        "With type Adam: true (DeepSpeed's default) decays as AdamW does, false adds it to the gradient."
    )
    torch_adam: bool | None = key(
        "torch's Adam; false: DeepSpeed's, which is compiled at the first start, on a GPU with nvcc. "
        "Left out: true."
    )
    fused: bool | None = key(
        "With torch_adam: each weight is read and written once a step. Left out: true."
    )
    refused: ClassVar = {
        "max_grad_norm": "use gradient_clipping",
        "bias_correction": "it is always on",
        "amsgrad": "not available in DeepSpeed's Adam",
        "fp32_optimizer_states": "masters and moments are kept in fp32",
    }
    neutral: ClassVar = {"bias_correction": (True,)}


ADAM: dict[str, Any] = {
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "adam_w_mode": True,
    "torch_adam": True,
    "fused": None,  # with torch_adam alone
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": ADAM, "Adam": ADAM, "SGD": {"momentum": 0.0}}
"""What each takes beside lr and weight_decay, with the defaults."""
REFUSED_OPTIMIZERS = {
    "Muon": "DeepSpeed's makes orthogonal what a rank of the tensor axis holds of a matrix, not the matrix, and from "
    "ZeRO-1 on clips the update in place of the gradient: the result would depend on the layout",
    "Lion": "DeepSpeed's moves a weight whose gradient is 0, as that of an unseen token's embedding, by a whole step",
    "Adagrad": "DeepSpeed rebuilds it for ZeRO and drops the parameter groups: norms and biases would decay",
    "Lamb": "it needs the norms of whole tensors, of which ZeRO gives it parts",
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
