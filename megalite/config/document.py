"""The whole JSON as one type, and the sizes of a model that rules need. Next: rules.py.

Each function takes the validated document (or sizes) and raises ConfigError with one line that names the key, its
value and the rule.
"""

from typing import Protocol

from megalite.config.deepspeed_keys import DeepSpeedKeys
from megalite.config.sections import Megalite


class Document(DeepSpeedKeys):
    """The whole JSON: DeepSpeed's keys, and ours under `megalite`."""

    megalite: Megalite


class ModelDims(Protocol):
    """The sizes of a model that the rules need."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def family(self) -> str: ...
    @property
    def causal(self) -> bool: ...
    @property
    def start_id(self) -> int | None: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def expert_size(self) -> int: ...
    @property
    def shared_size(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
