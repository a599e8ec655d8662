"""The head of a classifier: one hidden state per text, the family's dense layer, and a linear layer with one row per
label.

A sample may contain several texts. The label of each is at the position of its first token, and no other label counts,
so the loss is a sum over texts, just as a language model's is a sum over tokens, and nothing else has to change. The
head is small: every rank of the tensor axis computes all of it, from hidden states that are the same on each rank.
B samples of S tokens, n texts, D hidden, N labels. Next: transformer.py.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.dropout import Randomness, dropped
from megalite.model.mlp import Transform
from megalite.model.norms import Norm
from megalite.model.spec import TransformerSpec
from megalite.parallel.collectives import Split, leave
from megalite.parallel.layers import WholeLinear, name_parameters
from megalite.parallel.loss import IGNORED

LONGEST = 2**24  # most tokens in a sample, as in config/sections.py


class Classifier(nn.Module):
    """Hidden [B, S or S / t, D] -> logits [n, N], or with labels [B, S] the sum of the losses (fp32 scalar).

    In evaluation the result with labels is [1 + N²] instead: that sum, and the confusion matrix, whose rows are the
    true labels and whose columns the predicted ones.
    """

    def __init__(self, spec: TransformerSpec, split: Split) -> None:
        super().__init__()
        assert spec.classifier is not None
        self.how, self.split = spec.classifier, split
        size, whole = spec.hidden_size, Split(split.axis)
        self.norm = Norm(spec, split.axis, size, split.users) if spec.final_norm else None
        self.dense = WholeLinear(size, size, True, whole, spec.init_std) if self.how.dense else None
        self.transform = Transform(spec, whole) if spec.head_transform else None
        labels = len(self.how.labels)
        self.output = WholeLinear(size, labels, self.how.bias, whole, spec.init_std)
        name_parameters(self, "classifier")
        # Parts that a language model also has keep the names that they have there.
        if self.norm is not None:
            name_parameters(self.norm, "final_norm")
        if self.transform is not None:
            name_parameters(self.transform, "head.transform")

    @property
    def weight(self) -> nn.Parameter:
        return self.output.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.output.bias

    def forward(self, hidden: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        if self.norm is not None:
            hidden = self.norm(hidden)
        length = self.split.length(hidden)
        if labels is None:  # one text per row
            texts = torch.arange(hidden.shape[0], device=hidden.device) * length
        elif context.counted is not None:
            texts = context.counted
        else:  # all positions, most of which do not count: to find the texts would synchronize with the device
            texts = torch.arange(labels.numel(), device=hidden.device)
        logits = self._logits(self._pooled(hidden, texts, length, context), texts, length, context)
        if labels is None:
            return logits
        return self._scores(logits.float(), labels.flatten()[texts])

    def _pooled(self, hidden: Tensor, texts: Tensor, length: int, context: Context) -> Tensor:
        """The pooled hidden state [n, D] of each text, the same on every rank. texts [n] int64: index of each text's
        first token in the B·S tokens."""
        own = self.split.rows(length)
        if self.how.pooling == "mean":
            number, tokens = _texts_of_tokens(hidden.shape[0], length, context, hidden.device)
            sums = hidden.new_zeros(number.numel(), hidden.shape[-1])
            parts = number[:, own.start : own.stop].flatten()
            sums = sums.index_add(0, parts, hidden.flatten(0, 1))
            numbers = number.flatten()[texts]
            return self._gathered(sums[numbers]) / tokens[numbers].unsqueeze(-1).to(hidden.dtype)
        places = texts
        if self.how.pooling == "last":
            places = _last_places(hidden.shape[0], length, context, hidden.device)[texts]
        if not self.split.divides:
            return hidden.flatten(0, 1)[places]
        # Among the ranks that divide a sample's tokens, the one with the token contributes it, the others zeros.
        column = places % length - own.start
        elsewhere = (column < 0) | (column >= len(own))
        found = hidden[places // length, column.clamp(0, len(own) - 1)]
        return self._gathered(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def _gathered(self, parts: Tensor) -> Tensor:
        """Sums parts [n, D] over the ranks that divide the sequence."""
        return leave(parts, self.split.users)

    def _logits(self, pooled: Tensor, texts: Tensor, length: int, context: Context) -> Tensor:
        how = self.how

        def drop(x: Tensor, rate: float, part: str) -> Tensor:
            return _drop(x, context.randomness, f"classifier.{part}", rate, texts, length)

        if self.dense is not None:
            pooled = torch.tanh(self.dense(drop(pooled, how.dense_dropout, "dense")))
        if self.transform is not None:
            pooled = self.transform(pooled)
        return self.output(drop(pooled, how.dropout, "output"))

    def _scores(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, in evaluation with the confusion matrix; logits [n, N] fp32, labels [n]."""
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        if self.training:
            return loss
        size, counts = logits.shape[-1], labels != IGNORED
        cells = labels.clamp(min=0) * size + logits.argmax(dim=-1)
        table = logits.new_zeros(size * size).index_add_(0, cells, counts.to(logits.dtype))
        return torch.cat([loss.unsqueeze(0), table])


def _drop(
    x: Tensor, randomness: Randomness | None, place: str, rate: float, texts: Tensor, length: int
) -> Tensor:
    """Dropout of x [n, D], drawn by each text's sample and its position in it."""
    if randomness is None or rate == 0.0:
        return x
    keys = randomness.samples[texts // length] * LONGEST + texts % length
    mask = dropped(replace(randomness, samples=keys), place, rate, [range(x.shape[-1])])
    return x.masked_fill(mask, 0.0) / (1 - rate)


def _texts_of_tokens(
    b: int, s: int, context: Context, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The number of each token's text, int64 [B, S], and the number of tokens in each text, [B·S]."""
    begins = context.places(s, device).expand(b, s) == 0
    number = begins.flatten().cumsum(0) - 1
    tokens = torch.zeros(b * s, dtype=torch.int64, device=device)
    tokens.index_add_(0, number, torch.ones_like(number))
    return number.view(b, s), tokens


def _last_places(b: int, s: int, context: Context, device: torch.device) -> Tensor:
    """For each of the B·S tokens the index of the last token of its text, int64."""
    places = context.places(s, device).expand(b, s)
    rest = context.spans(s, device).expand(b, s) - 1 - places
    return torch.arange(b * s, device=device) + rest.flatten()
