"""`megalite COMMAND …`: the programs of launcher/ and tools/ under one name, without the checkout.

Start at `table.py`, which lists the commands; `main.py` finds and runs one. The modules beside them hold the commands
that belong to no other room.
"""
