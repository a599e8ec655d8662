"""How a process becomes a rank, and what all programs share."""
