"""Pipeline schedules as data, checked before a run. No file here knows tensors, ranks' processes or the config.

program.py    each rank's actions, and what each action takes and returns
schedules.py  1F1B, interleaved, zero bubble: pure functions that make programs
check.py      whether a program is complete, ordered and free of deadlock; its bubble and its memory
"""
