"""Small, good, fast: which file to take. Quality against bytes and against sentences per second, beside the encoders
that people run. `python -m rbe_gpu.reports.quality.small_good_fast` measures and writes the page.
"""
