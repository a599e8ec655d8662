"""The architecture: layers from a spec, chunks of them on a rank, and the families of Hugging Face configs."""
