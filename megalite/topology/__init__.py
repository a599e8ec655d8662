"""The axes of the grid, and which ranks form a group."""
