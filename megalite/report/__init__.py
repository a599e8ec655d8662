"""A run folder as a page, `report.html`: one self-contained file. Does not import torch.

read.py            the contents of a run folder, as values
numbers.py         figures as text: 12.3 k, 1.20 GiB, 0:03:12
charts.py          curves as SVG
rank_table.py      the ranks and their memory, predicted and measured
pipeline.py        a step on the ranks of the pipe axis, simulated and measured
run_timeline.py    starts, checkpoints and faults over wall-clock time
page.py            the page, with page.css and page.js inlined
report_program.py  `tools/report.py`
"""
