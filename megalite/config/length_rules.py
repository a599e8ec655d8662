"""The rules of a run's length: steps or epochs, and the settings that early stopping needs.

Each function takes the validated section and raises ConfigError with one line that names the key, its value and the
rule.
"""

from megalite.config.section import broken
from megalite.config.sections import Megalite
from megalite.errors import ConfigError


def check_length_of_run(megalite: Megalite) -> None:
    """Rules about the end of a run."""
    train = megalite.train
    if train.steps is None and train.epochs is None:
        raise ConfigError("megalite.train.steps: missing: give it or megalite.train.epochs")
    if train.epochs is not None:
        _check_epochs(megalite)
    enabled = {"keep_best": train.keep_best, "early_stop": train.early_stop is not None}
    for key in (key for key, is_on in enabled.items() if is_on):
        value = megalite.model_dump(exclude_none=True)["train"][key]
        if not megalite.data.valid:
            raise broken(f"megalite.train.{key}", value, "needs megalite.data.valid")
        if train.eval_interval == 0:
            rule = "needs megalite.train.eval_interval above 0"
            raise broken(f"megalite.train.{key}", value, rule)


def _check_epochs(megalite: Megalite) -> None:
    """An epoch has a length only for a single corpus in shuffled order."""
    key, train, data = "megalite.train.epochs", megalite.train, megalite.data
    if train.steps is not None:
        rule = f"must not be given with megalite.train.steps {train.steps}: set one of them to null"
        raise broken(key, train.epochs, rule)
    if len(data.train) > 1:
        rule = (
            f"needs one corpus in megalite.data.train: a blend of {len(data.train)} by weights has no epoch; give "
            "megalite.train.steps, or preprocess the files into one corpus"
        )
        raise broken(key, train.epochs, rule)
    if data.order == "megatron":
        rule = 'needs megalite.data.order "shuffled": "megatron" is built for a fixed number of samples'
        raise broken(key, train.epochs, rule)
