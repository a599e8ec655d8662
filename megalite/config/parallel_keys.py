"""The keys of `megalite.parallel`: how the model and the samples are divided among the ranks. Next: sections.py."""

from typing import Annotated, Literal

from pydantic import Field

from megalite.config.section import Counter, Positive, Section


class Parallel(Section):
    """How the ranks are laid out. The data axis is what is left: world size / (tensor × context × pipe)."""

    tensor: Positive = Field(1, description="Ranks that share each layer's matrices.")
    pipe: Positive = Field(1, description="Ranks that the layers are divided among.")
    schedule: Literal["1f1b", "interleaved", "zb-h1", "zb-v"] = Field(
        "1f1b",
        description="The order in which the ranks of the pipe axis work. `1f1b`: one chunk of layers a rank. "
        "`interleaved`: several, for a smaller bubble and more messages. `zb-h1`: weight gradients fill the bubble. "
        "`zb-v`: both, with two chunks a rank in the shape of a V: the smallest bubble. The result is the same; "
        "docs/layouts.md says which to choose.",
    )
    chunks: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Chunks of layers a rank with `interleaved`; left out: 2. With `zb-v` it is always 2.",
    )
    cut: Literal["cost"] | list[Counter] = Field(
        "cost",
        description="Layers of each chunk, in the order of the model, such as [5, 6, 6, 4]; the last may be 0, the "
        "head alone. `cost`: the cut with the shortest simulated step.",
    )
    sequence: bool = Field(
        False,
        description="Divide the sequence dim over the tensor axis between matrix products (arXiv 2205.05198): "
        "norms, dropout and hidden states take 1/t of the memory, the same bytes are sent.",
    )
    context: Positive = Field(
        1,
        description="Ranks that the tokens of each sample are divided among, for long samples: each has 1/c of the "
        "activations. 2 × context, times tensor with `sequence`, divides `megalite.data.sequence_length`.",
    )
    context_attention: Literal["gather", "heads"] = Field(
        "gather",
        description="How the ranks of the context axis compute attention. `gather`: each gathers the keys and values "
        "of the whole sample; any number of heads. `heads`: each computes some heads of the whole sample; context "
        "divides the heads of a rank of the tensor axis. The result is the same; docs/layouts.md says which to choose.",
    )
    expert: Positive = Field(
        1,
        description="Ranks of the data axis that share each layer's experts, a divisor of it and of the model's "
        "experts. Tokens travel to the ranks of their experts and back; ZeRO shards an expert's states over the rest "
        "of the data axis. docs/experts.md has more.",
    )

    @property
    def chunks_a_rank(self) -> int:
        """Chunks of layers that a rank of the pipe axis holds."""
        return {"interleaved": self.chunks or 2, "zb-v": 2}.get(self.schedule, 1)
