"""The order in which a rank computes and sends: pipeline schedules as data, checked before a run, and their
interpreter.

program.py        each rank's actions, and what each action takes and returns
schedules.py      1F1B, interleaved, zero bubble: pure functions that make programs
check.py          whether a program is complete, ordered and free of deadlock; its bubble and its memory
steps.py          one global order of all messages, which cannot hang under any of NCCL's rules
cut.py            which layers form a chunk: the cut with the shortest simulated step
pipeline_plan.py  the schedule of a run: its chunks and its program for a number of micro-batches
mailbox.py        receives posted early, sends kept until they complete
interpreter.py    runs the steps of a rank
actions.py        how F, B, I and W run on DeepSpeed's engine: a training step, an evaluation
forwards.py       forward passes without an engine: evaluation, likelihoods, generation
"""
