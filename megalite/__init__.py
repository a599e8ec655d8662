"""megalite: training of Megatron-style language models on stock DeepSpeed; one JSON, any layout, one result."""
