"""The rules of how long a run is: steps or epochs, and what a stop by the validation loss needs.

Each function takes the validated section and raises ConfigError with one line that names the key, its value and the
rule.
"""

from megalite.config.section import broken
from megalite.config.sections import Megalite
from megalite.errors import ConfigError


def check_length_of_run(megalite: Megalite) -> None:
    """Everything about where a run ends."""
    train = megalite.train
    if train.steps is None and train.epochs is None:
        raise ConfigError("megalite.train.steps: missing: give it or megalite.train.epochs")
    if train.epochs is not None:
        _check_epochs(megalite)
    wanted = {"keep_best": train.keep_best, "early_stop": train.early_stop is not None}
    for key in (key for key, asked in wanted.items() if asked):
        value = megalite.model_dump(exclude_none=True)["train"][key]
        if not megalite.data.valid:
            raise broken(f"megalite.train.{key}", value, "needs megalite.data.valid")
        if train.eval_interval == 0:
            rule = "needs megalite.train.eval_interval above 0"
            raise broken(f"megalite.train.{key}", value, rule)


def _check_epochs(megalite: Megalite) -> None:
    """Epochs have a length only where one corpus is taken in a shuffled order."""
    key, train, data = "megalite.train.epochs", megalite.train, megalite.data
    if train.steps is not None:
        rule = f"must not be given with megalite.train.steps {train.steps}: set one of them to null"
        raise broken(key, train.epochs, rule)
    if len(data.train) > 1:
        rule = (
            f"needs one corpus in megalite.data.train: {len(data.train)} that are taken by their weights have no "
            "common epoch; give megalite.train.steps, or preprocess the files into one corpus"
        )
        raise broken(key, train.epochs, rule)
    if data.order == "megatron":
        rule = 'needs megalite.data.order "shuffled": "megatron" is made for some number of samples'
        raise broken(key, train.epochs, rule)
