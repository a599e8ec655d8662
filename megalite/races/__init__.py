"""Compares speed with the programs that a user would use instead: `tools/benchmark_peers.py`.

A race (races.py) has contenders. Each has one or several ranks that stay alive, and contenders take steps in turn, from
the same weights and on the same tokens (race_inputs.py). A contender is a module that runs on its ranks. `ours.py` is
the training program; the others use only transformers, torch and DeepSpeed, and of this package only race_turns.py and
shared helpers of this room. `referee.py` starts them and keeps the time.
"""
