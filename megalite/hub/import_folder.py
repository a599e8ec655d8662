"""Imports a Hugging Face folder as our checkpoint, tensor by tensor. The reverse: export_folder.py.

Memory: a file of the checkpoint (checkpoint/files.py, FILE_BYTES) and two copies of the largest tensor, whatever the
model's size, plus mapped pages of one source file; `verify` needs more (same_logits.py).
"""

from pathlib import Path

from megalite.checkpoint.files import CheckpointWriter
from megalite.data.progress import counted
from megalite.errors import CheckpointError
from megalite.hub.carried import carried_files
from megalite.hub.hf_folder import HFFolder
from megalite.hub.same_logits import Comparison, compare
from megalite.hub.upcycle import Upcycled, UpcyclingOptions
from megalite.hub.whole import appearing


def import_hf(
    model: str | Path,
    output: str | Path,
    verify: bool | None = None,
    experts: UpcyclingOptions | None = None,
) -> Comparison | None:
    """Writes a checkpoint of step 0 in fp32. The folder appears once everything is written and verified, or not at all.

    verify: whether to compare the logits with transformers'; None: if there is enough memory. experts: to create from a
    dense model's MLPs (upcycle.py). Returns the comparison, None if there was none. Raises CheckpointError,
    ConfigError, ConversionError.
    """
    dense = HFFolder(model)
    source = dense if experts is None else Upcycled(dense, experts)
    state = {
        "step": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "seed": 0 if experts is None else experts.seed,
        "layout": None,
        "tokenizer": None,
        **dense.state,
    }
    with appearing(output, CheckpointError) as partial:
        with CheckpointWriter(partial, source.model, state) as writer:
            for name in counted(source.names, len(source.names), "tensors written"):
                writer.add(name, source.read(name).float())
            for path in carried_files(source.folder):
                writer.carry(path)
        return compare(partial, source.folder, verify)
