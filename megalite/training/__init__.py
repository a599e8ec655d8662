"""One run: the program, the loop and its watchers."""
