"""`megalite COMMAND …`: the programs of launcher/ and tools/ under one name, without the checkout.

Start at `table.py`, which lists the commands; `main.py` finds and runs one. The other modules are commands that belong
to no other room.
"""
