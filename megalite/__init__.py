"""megalite: training of Megatron-style language models on stock DeepSpeed; one JSON, any layout, one result.

From Python, in a script or a notebook:

    import megalite

    run = megalite.train("config.json", ["megalite.train.steps=100"])
    model = megalite.load(run)
    print(model.generate("Once upon a time"), model.loss("Once upon a time there was a fox."))

Importing the package is quick: torch is imported at the first use of one of these names.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalite.api import Model, load, train

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load", "train"):
        from megalite import api

        return getattr(api, name)
    raise AttributeError(f"module 'megalite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
