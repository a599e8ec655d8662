"""The same training on fewer hosts: same global batch, fewer data ranks, more gradient accumulation. Next:
restarts.py."""

import re
from collections.abc import Sequence

from megalite.config import check_model, load_config
from megalite.errors import ConfigError
from megalite.model.families import read_spec

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)


class ProgramConfig:
    """The config in a program's arguments. Raises ConfigError if they name none."""

    def __init__(self, arguments: Sequence[str]) -> None:
        words, self.path = list(arguments), None
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == "--deepspeed_config":
                self.path = value if equals else next(iter(words[i + 1 :]), None)
        if self.path is None:
            raise ConfigError(
                "--deepspeed_config: missing: needed to keep the global batch on fewer hosts"
            )
        self.overrides = [word for word in words if _OVERRIDE.fullmatch(word)]

    def fit(self, full: dict[str, int], hosts: dict[str, int]) -> tuple[dict[str, int], list[str]]:
        """The longest prefix of `hosts` that can run the training of `full`, and the overrides for that: none if all
        hosts are there. Raises ConfigError with the rule that `hosts` breaks if there is none."""
        if hosts == full:
            return hosts, []
        config = load_config(self.path or "", self.overrides).resolve(sum(full.values()))
        fixed = [
            f"train_batch_size={config.train_batch_size}",
            f"train_micro_batch_size_per_gpu={config.micro_batch_size}",
            "gradient_accumulation_steps=null",
        ]
        broken: ConfigError | None = None
        for count in range(len(hosts), 0, -1):
            some = dict(list(hosts.items())[:count])
            try:
                fewer = load_config(self.path or "", [*self.overrides, *fixed]).resolve(
                    sum(some.values())
                )
                check_model(fewer, read_spec(fewer.model))
                return some, fixed
            except ConfigError as error:
                broken = broken or error
        raise broken or ConfigError("no host is left")
