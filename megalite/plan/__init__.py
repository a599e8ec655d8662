"""Before a run: predicted memory and time of every rank, and the layout to take."""
