"""`python -m rbe_gpu.cli._compile_later MODEL [int8|float]`: the second process of `_compiling`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from rbe_gpu.compile_ahead import compile_later_kernels
    from rbe_gpu.models.load import load

    model, *activations = sys.argv[1:]
    compile_later_kernels(load(model, activations=activations[0] if activations else None))
