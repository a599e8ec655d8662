"""DeepSpeed: its engine and its ZeRO optimizers, extended by subclasses; the only room that knows it."""
