"""A run folder as a page to look at: `report.html`, one file that needs nothing else. No torch.

read.py       what a run folder holds, as values
numbers.py    figures in words: 12.3 k, 1.20 GiB, 0:03:12
charts.py     curves as SVG
grid.py       the ranks and their memory, predicted and measured
pipeline.py   a step on the ranks of the pipe axis, simulated and measured
timeline.py   starts, checkpoints and faults by the clock
page.py       the page; page.css and page.js are put into it
program.py    `tools/report.py`
"""
