"""The errors that megalite raises on purpose. Everything else is a bug or the machine's.

A `UserError` is a mistake that its reader can mend: one line that names the key or the file, its
value and the rule it broke. Programs print that line to standard error and exit with 2.
"""


class MegaliteError(Exception):
    """Base of all errors raised on purpose; a program that ends by one exits with `exit_code`."""

    exit_code = 1
    agreed = False
    """Whether every rank raises it, so that one of them should print it."""


class UserError(MegaliteError):
    """A mistake of the user's: one line, or one for each that there is, exit code 2, nothing lost or written over.
    The error's text is the first of its `lines`."""

    exit_code = 2

    def __init__(self, first: str, *others: str) -> None:
        super().__init__(first)
        self.lines = (first, *others)


class ConfigError(UserError):
    """A key of the JSON, an override or an argument breaks a rule."""


class DataError(UserError):
    """A corpus, a tokenizer or a text file is absent, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder is absent, damaged or does not fit the model."""


class TrainingError(MegaliteError):
    """A run that cannot continue: a loss or gradient that is not finite, a last checkpoint that could not be saved.
    Every rank has the same figures, so every rank raises it."""

    agreed = True


class ConversionError(MegaliteError):
    """Converted weights do not give the logits that they should."""
