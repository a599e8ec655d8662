"""Verifies a conversion: transformers' model and ours must give the same logits for the same tokens.

The two models are in memory one after the other, in fp32: 4 bytes per parameter and the logits of TOKENS positions. By
default, the comparison is done if that is at most FITS of the available memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megalite.checkpoint.saved_bias import set_router_bias
from megalite.checkpoint.weights import load_module
from megalite.errors import CheckpointError, ConversionError
from megalite.hub.hf_folder import HFFolder, full_shapes
from megalite.hub.names import hf_auto_class
from megalite.hub.sources import Weights, open_weights
from megalite.inputs import reading
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import Stage
from megalite.parallel.grid import Grid

BOUND = 1e-4
"""Bound of the difference of two logits, relative to the largest logit (or to 1 if that is smaller). fp32 rounding over
tens of layers stays well below it; a wrong or misplaced tensor is far above it."""
TOKENS = (2, 24)
SOURCE = 15
"""Number of those tokens that are the source of an encoder-decoder."""
FITS = 0.5


@dataclass(frozen=True)
class Comparison:
    """difference: largest difference of two logits; largest: the largest logit; bound: of the difference."""

    difference: float
    largest: float
    bound: float

    def __str__(self) -> str:
        return (
            f"logits equal transformers': maximum difference {self.difference:.3g}, "
            f"bound {self.bound:.3g}, largest logit {self.largest:.3g}"
        )


def compare(
    ours: Path, theirs: Path, wanted: bool | None, dtype: torch.dtype | None = None
) -> Comparison | None:
    """Compares a folder of either kind, read by us, with a Hugging Face folder, read by transformers.

    wanted: whether to compare; None: if there is enough memory. Returns None if nothing was compared. dtype: the dtype
    that the Hugging Face folder was rounded to. Raises ConversionError if the difference exceeds the bound.
    """
    source = open_weights(ours)
    spec = source.spec if isinstance(source, HFFolder) else read_spec(source.model)
    if wanted is False or (wanted is None and not fits(spec)):
        return None
    generator = torch.Generator().manual_seed(0)
    length = min(TOKENS[1], spec.max_positions or TOKENS[1])
    tokens = torch.randint(0, spec.vocabulary_size, (TOKENS[0], length), generator=generator)
    if spec.classifier is not None:
        # Decoders classify the last token that is not padding, so no text may end with the padding token.
        tokens[:, -1] = (source.model.get("pad_token_id") or 0) - 1
        tokens[:, -1] %= spec.vocabulary_size
    with reading(theirs, CheckpointError):
        expected = hf_logits(theirs, tokens, spec)
    difference = (our_logits(source, spec, tokens, dtype) - expected).abs().max().item()
    largest = expected.abs().max().item()
    result = Comparison(difference, largest, BOUND * max(1.0, largest))
    if not math.isfinite(difference) or difference > result.bound:
        raise ConversionError(
            f"{theirs}: logits differ from transformers' by {difference:.3g}: must be at most "
            f"{result.bound:.3g}"
        )
    return result


def fits(spec: TransformerSpec) -> bool:
    """Whether the available memory is enough for the comparison."""
    numbers = sum(math.prod(shape) for shape in full_shapes(spec).values())
    logits = 3 * TOKENS[0] * TOKENS[1] * spec.vocabulary_size
    return 4 * (numbers + logits) <= FITS * psutil.virtual_memory().available


@torch.no_grad()
def hf_logits(folder: Path, tokens: Tensor, spec: TransformerSpec) -> Tensor:
    """Logits [B, S, V], or [B, N] for a classifier, of transformers' model in fp32. The implementations are set here,
    because a config.json may name code to download and run for attention and experts."""
    from transformers.utils import logging  # takes seconds to import

    logging.disable_progress_bar()
    model: Any = hf_auto_class(spec).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    model.eval()
    if spec.stacks is not None:
        source, target = tokens.split([SOURCE, tokens.shape[1] - SOURCE], dim=1)
        return model(source, decoder_input_ids=target).logits
    if spec.classifier is None:
        return model(tokens).logits
    # One row at a time: without a padding token a decoder's classifier does not support more.
    return torch.cat([model(row).logits for row in tokens.split(1)])


@torch.no_grad()
def our_logits(
    source: Weights, spec: TransformerSpec, tokens: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """Logits [B, S, V], or [B, N] for a classifier, of our model in fp32, with its weights first rounded to `dtype`."""
    stage = Stage(spec, Grid()).eval()
    load_module(source.read, stage)
    set_router_bias(stage, source.state, torch.device("cpu"))
    if dtype is not None:
        for value in stage.parameters():
            value.copy_(value.to(dtype))
    return stage(tokens, context=Context(source=SOURCE if spec.stacks is not None else 0))
