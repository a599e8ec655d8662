"""The errors that megalite raises on purpose. Any other exception is a bug or a fault of the machine.

A `UserError` is a mistake that the user can correct: one line that names the key or the file, its
value and the rule it breaks. Programs print that line to standard error and exit with code 2.
"""


class MegaliteError(Exception):
    """Base class of all errors raised on purpose; a program that one of them ends exits with `exit_code`."""

    exit_code = 1
    agreed = False
    """Whether every rank raises this error, so that only one of them should print it."""


class UserError(MegaliteError):
    """A mistake by the user: one line for each mistake, exit code 2, nothing lost or overwritten.
    The error's text is the first of its `lines`."""

    exit_code = 2

    def __init__(self, first: str, *others: str) -> None:
        super().__init__(first)
        self.lines = (first, *others)


class ConfigError(UserError):
    """A key of the JSON, an override or an argument breaks a rule."""


class DataError(UserError):
    """A corpus, a tokenizer or a text file is missing, is damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder is missing, is damaged or does not fit the model."""


class TrainingError(MegaliteError):
    """A run that cannot continue: a loss or gradient is not finite, or the last checkpoint could not be saved.
    Every rank has the same values, so every rank raises it."""

    agreed = True


class ConversionError(MegaliteError):
    """Converted weights do not give the expected logits."""
