"""Describes a checkpoint in lines for people: `tools/inspect_checkpoint.py`."""

from collections.abc import Iterator

from megalite.checkpoint.files import WEIGHT, Checkpoint, size_bytes

SHOWN_STATE = (
    "step",
    "consumed_samples",
    "consumed_tokens",
    "seed",
    "sequence_length",
    "tokenizer",
)
SHOWN_SIZES = ("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")


def described(checkpoint: Checkpoint, tensors: bool) -> Iterator[str]:
    """Lines about the run's position, the layout that wrote it, the model and sizes; with `tensors`, about each
    weight."""
    state, entries = checkpoint.state, checkpoint.index.entries
    yield f"checkpoint {checkpoint.folder}"
    for key in SHOWN_STATE:
        if key in state:
            yield f"  {key}: {state[key]}"
    for key, value in (state.get("layout") or {}).items():  # null: imported, so no layout wrote it
        yield f"  written by {key}: {value}"
    model = checkpoint.model
    sizes = [f"{key} {model[key]}" for key in SHOWN_SIZES if key in model]
    yield f"  model: {model.get('model_type')}, {', '.join(sizes)}"
    parameters = sum(entries[f"{WEIGHT}/{name}"].numel for name in checkpoint.names)
    files = checkpoint.index.boxes_by_file()
    moments = "without moments"
    if checkpoint.has_moments:
        moments = f"with {', '.join(sorted(checkpoint.moments))}"
    yield f"  {len(checkpoint.names)} weights of {parameters:,} parameters, {moments}"
    yield f"  {size_bytes(checkpoint.index):,} bytes in {len(files)} files, {sum(files.values())} boxes"
    if tensors:
        for name in checkpoint.names:
            entry = entries[f"{WEIGHT}/{name}"]
            count = sum(1 for _ in checkpoint.index.chunks(f"{WEIGHT}/{name}"))
            yield f"  {name}  {list(entry.shape)}  {str(entry.dtype).removeprefix('torch.')}  {count} boxes"
