"""The rules of the expert axis: its size against the data axis and the model, and the ZeRO settings that support it.

Each raises ConfigError with one line. Called by rules.py.
"""

from megalite.config.document import Document, ModelDims
from megalite.config.parallel_keys import Parallel
from megalite.config.section import broken
from megalite.config.sections import Megalite

PATH = "megalite.parallel.expert"


def check_zero_of_experts(document: Document) -> None:
    """ZeRO settings that work with an expert axis."""
    expert, zero = document.megalite.parallel.expert, document.zero_optimization
    if expert == 1 or zero is None:
        return
    if zero.stage == 3:
        rule = f"must be at most 2 with {PATH} {expert}: DeepSpeed gathers weights over one group of ranks"
        raise broken("zero_optimization.stage", zero.stage, rule)
    for name in ("reduce_scatter", "contiguous_gradients"):
        if getattr(zero, name) is False:
            raise broken(f"zero_optimization.{name}", False, f"must be true with {PATH} {expert}")
    offload = zero.offload_optimizer
    if offload is not None and offload.device != "none":
        path = "zero_optimization.offload_optimizer.device"
        raise broken(
            path, offload.device, f"must be none with {PATH} {expert}: offloading is untested"
        )


def check_expert_axis(parallel: Parallel, data: int) -> None:
    """The expert axis divides the data axis of `data` ranks."""
    if data % parallel.expert:
        raise broken(PATH, parallel.expert, f"must divide the data axis of {data} ranks")


def check_experts(megalite: Megalite, dims: ModelDims) -> None:
    """The expert axis and the router's settings must fit the model."""
    expert, router = megalite.parallel.expert, megalite.train.router
    if dims.experts == 0 and expert > 1:
        raise broken(
            PATH, expert, f"must be 1: a {dims.family} model of this config has no experts"
        )
    if dims.experts == 0 and router is not None:
        given = router.model_dump(exclude_defaults=True)
        rule = f"must be left out: a {dims.family} model of this config has no experts"
        raise broken("megalite.train.router", given, rule)
    if router is not None and router.bias_rate is not None and router.balance != "bias":
        path = "megalite.train.router"
        raise broken(f"{path}.bias_rate", router.bias_rate, f'needs {path}.balance "bias"')
    if dims.experts % expert:
        raise broken(PATH, expert, f"must divide the model's {dims.experts} experts")
