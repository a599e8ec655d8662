"""How a rank computes and sends what its program says (programs/).

steps.py          one global order of all messages, which cannot hang under any of NCCL's rules
cut.py            which layers form a chunk: the cut with the shortest simulated step
pipeline_plan.py  the schedule of a run: its chunks and its program for a number of micro-batches
mailbox.py        receives posted early, sends kept until they complete
interpreter.py    runs the steps of a rank
actions.py        how F, B, I and W run on DeepSpeed's engine: a training step, an evaluation
forwards.py       forward passes without an engine: evaluation, likelihoods, generation
"""
