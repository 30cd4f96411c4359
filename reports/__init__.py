"""Measured reports: speed, memory, size and quality on real weights and real text.

`harness/` measures and shows rows, `speed/` and `quality/` are the two reports on the CPU, `gpu/` is the check on an
NVIDIA GPU, `targets.py` says what must be reached. `run.py` runs a report; `python -m rbe_gpu.reports` writes its
page from rows. Plots and pages read only the rows in `results/` or of a run.
"""
