"""The router, which chooses the experts of each token, and the losses that balance their load. Next: experts.py.

The router's product, softmax and choice are computed in fp32 on every rank of the tensor axis; of equal probabilities
the lower expert comes first. So ranks that hold the same token choose the same experts, on every layout.

Load balancing does not depend on the layout: `sample` (arXiv 2412.19437, equations 17 to 20) adds for each layer and
sample

    coefficient · Σ_i f_i P_i,     f_i = E / (k S) · tokens that chose expert i,     P_i = mean probability of expert i

averaged over the samples of the global batch that have a label that counts; it equals the coefficient if all experts
are used equally. transformers instead multiplies means over a micro-batch and all layers, which depends on the
micro-batch, the accumulation and the data axis. `bias` adds no loss; engine/router_bias.py updates the bias. z_loss is
added like `sample`: the mean over a sample's tokens of the squared log of the softmax denominator (arXiv 2202.08906,
equation 5).

T tokens of B samples, E experts, k of them chosen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.spec import Mixture, TransformerSpec
from megalite.parallel.collectives import Split, enter, leave, sum_over
from megalite.parallel.deferred import later
from megalite.parallel.grid import Axis
from megalite.parallel.layers import parameter


class Router(nn.Module):
    """Rows [T, D] -> chosen experts [T, k] int64, best first, and their weights [T, k] fp32.

    context_axis: divides the tokens of a sample. bias [E] fp32: added to the probabilities for the choice of experts
    only. tally [E] int64: number of tokens that went to each expert, counted in backward passes since it was last
    zeroed, without samples that pad the batch.
    """

    tally: Tensor
    bias: Tensor

    def __init__(
        self, spec: TransformerSpec, mixture: Mixture, split: Split, context_axis: Axis
    ) -> None:
        super().__init__()
        self.mixture, self.axis, self.context_axis = mixture, split.axis, context_axis
        shape = (mixture.count, spec.hidden_size)
        self.weight = parameter(shape, None, split.axis, spec.init_std)
        tally = torch.zeros(mixture.count, dtype=torch.int64)
        self.register_buffer("tally", tally, persistent=False)
        self.register_buffer("bias", torch.zeros(mixture.count), persistent=False)

    def forward(self, rows: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        # Each rank of the tensor axis computes a part of the gradient, from its features of the experts.
        weight = enter(later(self.weight), self.axis)
        logits = F.linear(rows.float(), weight.float())
        probabilities = logits.softmax(dim=-1)
        chosen = self.choose(probabilities.detach() + self.bias)
        weights = probabilities.gather(1, chosen)
        if self.mixture.normalised:
            total = weights.sum(dim=-1, keepdim=True)
            if self.mixture.least_sum > 0:
                total = total.clamp(min=self.mixture.least_sum)
            weights = weights / total
        if context.balance is not None and torch.is_grad_enabled():
            weights = self._with_losses(weights, logits, probabilities, chosen, context.balance)
        return chosen, weights

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> the k best experts [T, k], best first; of equal ones the lower number first."""
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        return ranked[:, : self.mixture.chosen].contiguous()

    def _with_losses(
        self, weights: Tensor, logits: Tensor, probabilities: Tensor, chosen: Tensor, each: Tensor
    ) -> Tensor:
        """The weights; their backward adds the router's losses, weighted by `each` [B] per sample, and the tally."""
        b = len(each)
        every = torch.arange(self.mixture.count, device=chosen.device)
        # Not scatter_add: on GPUs it adds in no fixed order.
        counts = (chosen.view(b, -1, 1) == every).sum(dim=1).float()
        losses = self._losses(
            logits.unflatten(0, (b, -1)), probabilities.unflatten(0, (b, -1)), counts
        )
        # Every rank of the tensor axis has the same losses, and the gradients are summed over the ranks.
        loss = None if losses is None else (losses * each).sum() / self.axis.size
        real = counts * (each > 0).unsqueeze(-1)
        return _Attach.apply(weights, loss, self.tally, real.sum(0).long())  # type: ignore[return-value]

    def _losses(self, logits: Tensor, probabilities: Tensor, counts: Tensor) -> Tensor | None:
        """The router's loss of each sample [B]; None if there is none. logits, probabilities [B, S, E]; counts
        [B, E]."""
        mixture, losses = self.mixture, None
        length = logits.shape[1] * self.context_axis.size
        if mixture.balance == "sample" and mixture.balance_coefficient > 0:
            often = sum_over(counts.clone(), self.context_axis)
            often = often * (mixture.count / (mixture.chosen * length))
            likely = leave(probabilities.sum(1), self.context_axis) / length
            losses = mixture.balance_coefficient * (often * likely).sum(-1)
        if mixture.z_loss > 0:
            squares = logits.logsumexp(dim=-1).square().sum(-1) / length
            z_losses = mixture.z_loss * squares
            losses = z_losses if losses is None else losses + z_losses
        return losses


class _Attach(torch.autograd.Function):
    """Returns the weights. Backward gives `loss`, which is not part of any output, the gradient 1, and adds to the
    tally: not in forward, which runs twice in layers that are recomputed."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, loss: Tensor | None, tally: Tensor, counts: Tensor
    ) -> Tensor:
        ctx.has_loss, ctx.tally = loss is not None, tally
        ctx.save_for_backward(counts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ctx.tally.add_(ctx.saved_tensors[0])
        one = grads[0].new_ones((), dtype=torch.float32) if ctx.has_loss else None
        return grads[0], one, None, None
