"""The keys of `megalite.parallel`, which divide the model and the samples among the ranks. Next: sections.py."""

from typing import Annotated, Literal

from pydantic import Field

from megalite.config.section import Counter, Positive, Section
from megalite.programs.schedules import SCHEDULES

_SCHEDULES = " ".join(f"`{name}`: {schedule.about}." for name, schedule in SCHEDULES.items())
_CHOOSES = " or ".join(f"`{name}`" for name, one in SCHEDULES.items() if one.chunks is None)


class Parallel(Section):
    """The sizes of the grid's axes. The data axis takes the rest: world size / (tensor × context × pipe)."""

    tensor: Positive = Field(1, description="Ranks that share each layer's matrices.")
    pipe: Positive = Field(1, description="Ranks that the layers are divided among.")
    schedule: Literal[*SCHEDULES] = Field(  # type: ignore[valid-type]
        "1f1b",
        description=f"The pipeline schedule. {_SCHEDULES} All give the same result; docs/layouts.md says which to "
        "choose.",
    )
    chunks: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description=f"Chunks of layers per rank with {_CHOOSES}; left out: 2. With other schedules it is fixed.",
    )
    cut: Literal["cost"] | list[Counter] = Field(
        "cost",
        description="Number of layers in each chunk, in model order, such as [5, 6, 6, 4]; the last may be 0, for the "
        "head alone. `cost`: the cut with the shortest simulated step.",
    )
    sequence: bool = Field(
        False,
        description="Sequence parallelism: divide the sequence dim over the tensor axis between matrix products "
        "(arXiv 2205.05198). Norms, dropout and hidden states take 1/tensor of the memory; as many bytes are sent. "
        "With more than one sample per micro-batch each message needs an extra copy.",
    )
    context: Positive = Field(
        1,
        description="Ranks that the tokens of each sample are divided among, for long samples: each holds 1/context of "
        "the activations. 2 × context, times tensor with `sequence`, must divide `megalite.data.sequence_length`.",
    )
    context_attention: Literal["gather", "heads"] = Field(
        "gather",
        description="How the ranks of the context axis compute attention. `gather`: each gathers the keys and values "
        "of the whole sample; any number of heads. `heads`: each computes some heads of the whole sample; context "
        "must divide the heads of a tensor rank. Both give the same result; docs/layouts.md says which to choose.",
    )
    expert: Positive = Field(
        1,
        description="Ranks that the experts of each layer are divided among; it must divide the data axis, of which "
        "they are a part, and the model's experts. Tokens are sent to the ranks of their experts and back; ZeRO shards "
        "an expert's states over the rest of the data axis. docs/experts.md has more.",
    )

    @property
    def chunks_a_rank(self) -> int:
        """Chunks of layers that a rank of the pipe axis holds."""
        return SCHEDULES[self.schedule].chunks or self.chunks or 2
