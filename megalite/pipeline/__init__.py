"""In which order a rank computes and sends: pipeline schedules as data, checked before a run, and what executes them.

program.py      actions of each rank, and what each needs and gives
schedules.py    1F1B, interleaved, zero bubble: pure functions that make programs
check.py        is a program complete, ordered and free of deadlock; its bubble and what it holds
steps.py        one global order of all messages, which cannot hang whatever NCCL's rules
cut.py          which layers are a chunk: by the simulated step
plan.py         the schedule of a run: its chunks and its program for a number of micro-batches
mailbox.py      receives posted early, sends kept until they are gone
interpreter.py  runs the steps of a rank
actions.py      what F, B, I and W are on DeepSpeed's engine: a training step, an evaluation
forwards.py     forward passes without an engine: evaluation, likelihoods, generation
"""
