"""The section `megalite.train.router`. Next: sections.py, of which it is a part."""

from typing import Literal

from pydantic import Field

from megalite.config.section import Counter, Section


class Router(Section):
    """How the routers of a model with experts are trained beside the loss; docs/experts.md has the formulas."""

    balance: Literal["sample", "bias", "none"] = Field(
        "sample",
        description="`sample`: a loss for each layer and sample, times the model config's router_aux_loss_coef, that "
        "is least if all experts are used alike; it is the same on every layout, unlike transformers' own. "
        "`bias`: no loss, but a bias of each expert, added to the probabilities by which experts are chosen, moves "
        "after each step by how many tokens of the global batch the expert got. `none`: neither.",
    )
    bias_rate: float | None = Field(
        None, gt=0, description="How far a bias moves in a step; left out: 1e-3."
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared logarithm of the router's softmax denominator, in each layer.",
    )
    load_interval: Counter = Field(
        10,
        description="Steps between two rows of metrics with each expert's tokens, `expert_tokens`, and lines about "
        "experts without a token; 0: never.",
    )

    @property
    def step_of_bias(self) -> float:
        """By how much a bias moves in a step, 0 where none does."""
        return 0.0 if self.balance != "bias" else self.bias_rate or 1e-3
