"""The rules of the context axis, which divides the tokens of each sample.

Each raises ConfigError with one line. Called by rules.py.
"""

from megalite.config.document import ModelDims
from megalite.config.parallel_keys import Parallel
from megalite.config.section import broken

PATH = "megalite.parallel"


def check_context_keys(parallel: Parallel) -> None:
    """Rules that need neither the world size nor the model."""
    if parallel.context_attention == "heads" and parallel.context == 1:
        rule = f"needs {PATH}.context of 2 or more"
        raise broken(f"{PATH}.context_attention", parallel.context_attention, rule)


def check_context_length(parallel: Parallel, length: int) -> None:
    """Each rank holds two runs of a sample's tokens (parallel/rows.py), which sequence parallelism divides again."""
    if parallel.context == 1:
        return
    unit = 2 * parallel.context
    factors = f"2 × {PATH}.context {parallel.context}"
    if parallel.sequence and parallel.tensor > 1:
        unit *= parallel.tensor
        factors += f" × {PATH}.tensor {parallel.tensor}"
    if length % unit:
        rule = f"must be a multiple of {factors} = {unit}"
        raise broken("megalite.data.sequence_length", length, rule)


def check_context_heads(parallel: Parallel, dims: ModelDims) -> None:
    """If context ranks exchange tokens for heads, each needs a whole number of heads."""
    if parallel.context_attention != "heads":
        return
    context, tensor = parallel.context, parallel.tensor
    mode = f'with {PATH}.context_attention "heads"'
    heads = dims.num_heads // tensor
    if heads % context:
        rule = (
            f"must divide num_attention_heads {dims.num_heads} / tensor {tensor} = {heads} {mode}"
        )
        raise broken(f"{PATH}.context", context, rule)
    keys = max(1, dims.num_kv_heads // tensor)
    if keys % context and context % keys:
        rule = f"must divide the {keys} key/value heads of a rank or be a multiple of it {mode}"
        raise broken(f"{PATH}.context", context, rule)
