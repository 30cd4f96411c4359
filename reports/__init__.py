"""Measured reports: speed, memory, size and quality on real weights and real text.

`bench.py` measures, `cases/` says what is measured, `quality.py` measures a compressed model, `plot.py` and
`page.py` show the rows, `run.py` does all of it. Plots and page read only the CSV rows.
"""
