"""CUDA launchers: one file per op, the arithmetic of launches in `_launch` and `_rows`, CuPy in `_load`."""
