"""Speed beside the programs that a user would take instead: `tools/benchmark_peers.py`.

A race (races.py) has contenders, each a few ranks that stay alive and step in turn, from the same weights over the same
tokens (inputs.py). Each contender is a module that is run on its ranks. `ours.py` is the training program; the others
are written with transformers, torch and DeepSpeed alone, and know of this package but turns.py. `referee.py` starts
them and keeps the time.
"""
