"""The section `megalite.train.router`. Next: sections.py, which includes it."""

from typing import Literal

from pydantic import Field

from megalite.config.section import Counter, Section


class RouterSection(Section):
    """Training of the routers of a model with experts, beyond the model's loss; docs/experts.md has the formulas."""

    balance: Literal["sample", "bias", "none"] = Field(
        "sample",
        description="Load balancing. `sample`: an auxiliary loss for each layer and sample, times the model config's "
        "router_aux_loss_coef, which is lowest if all experts are used equally; unlike transformers', it is the same "
        "on every layout. `bias`: no loss, but a bias for each expert, added to the probabilities that select experts "
        "and updated after each step by the expert's share of the global batch's tokens. `none`: neither.",
    )
    bias_rate: float | None = Field(
        None, gt=0, description="Change of a bias per step; left out: 1e-3."
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the router z-loss of each layer: the mean squared logarithm of the softmax denominator.",
    )
    load_interval: Counter = Field(
        10,
        description="Steps between two metrics rows with `expert_tokens`, the tokens of each expert, and log lines "
        "about experts without tokens; 0: never.",
    )

    @property
    def step_of_bias(self) -> float:
        """The change of a bias per step; 0 if the balance is not by bias."""
        return 0.0 if self.balance != "bias" else self.bias_rate or 1e-3
