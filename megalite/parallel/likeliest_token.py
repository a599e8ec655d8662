"""The argmax of logits that the tensor axis splits; two numbers per row cross the axis."""

import torch
from torch import Tensor

from megalite.parallel.collectives import gather_over
from megalite.parallel.grid import Axis
from megalite.parallel.layers import share


def likeliest_token(logits: Tensor, vocabulary_size: int, axis: Axis) -> Tensor:
    """Ids of the largest logits, int64 […], of logits […, V / t]; the lowest id of equal logits. The same on every rank
    (collective over the tensor axis). V vocabulary size, t size of the axis."""
    start, _ = share(vocabulary_size, axis)
    column = logits.argmax(dim=-1, keepdim=True)  # the first of equal ones, here and over the ranks
    pair = [logits.gather(-1, column).double(), (column + start).double()]
    values, ids = gather_over(torch.cat(pair, dim=-1), axis).unbind(-1)  # [t, …]
    return ids.gather(0, values.argmax(dim=0, keepdim=True))[0].long()
