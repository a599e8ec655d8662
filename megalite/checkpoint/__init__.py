"""Tensors on disk: checkpoints that any layout reads, written by all ranks together."""
