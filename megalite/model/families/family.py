"""What megalite knows about one model family of transformers. Each family's module ends with its `FAMILY`.

Next: __init__.py, which lists the families.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.model.families.common import HFTensor
from megalite.model.spec import TransformerSpec

HEAD_DIM = frozenset({"head_dim"})
"""`old_keys` of many families: not a field of the config class, but read by its attention."""


@dataclass(frozen=True)
class Family:
    """How the configs and files of one `model_type` are read and written."""

    read: Callable[[Any], TransformerSpec]
    """Converts a transformers config to our spec. Raises ConfigError for a value that is not supported."""
    tensors: Mapping[str, HFTensor]
    """Our tensor names -> their location in the files."""
    old_keys: frozenset[str] = frozenset()
    """Keys of a config that have a meaning but are not fields of its class."""
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values that this family accepts of fields that other families reject."""
    check: Callable[[dict[str, Any], str], None] | None = None
    """Raises ConfigError for values on which the config class itself fails; gets the values and the prefix of their
    names in a message."""
    amend: Callable[[Any], None] | None = None
    """Corrects a config object, in place."""
    unused: re.Pattern[str] | None = None
    """Tensors in the files that the model does not use."""
    copies: tuple[str, ...] = ()
    """Tensors in the files that must equal the embedding."""
    router_bias: str | None = None
    """The name in the files of the biases for choosing experts."""
    tensors_of_layer: (
        Callable[[TransformerSpec, int], tuple[Mapping[str, HFTensor], int]] | None
    ) = None
    """The table of a layer's tensors, and the layer's number in its stack. For an encoder-decoder, whose files number
    the layers of each stack."""
