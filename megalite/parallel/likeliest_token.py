"""The likeliest token of logits that the tensor axis splits; two numbers a row cross the axis."""

import torch
from torch import Tensor

from megalite.parallel.collectives import gather_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share


def likeliest_token(logits: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """int64 […] of logits […, V / t], the same on every rank: of equal ones the lowest id (collective over the tensor
    axis). V vocabulary, t size of the axis."""
    start, _ = share(vocabulary_size, axis)
    column = logits.argmax(dim=-1, keepdim=True)  # of equal ones the first, here and over the ranks
    pair = [logits.gather(-1, column).double(), (column + start).double()]
    values, ids = gather_over(torch.cat(pair, dim=-1), axis).unbind(-1)  # [t, …]
    return ids.gather(0, values.argmax(dim=0, keepdim=True))[0].long()
