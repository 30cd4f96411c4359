"""`python -m rbe_gpu.cli._compile_later MODEL [int8|float]`: the second process of `_compiling`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from rbe_gpu.compile_ahead import compile_later_kernels
    from rbe_gpu.models.decoder import Decoder
    from rbe_gpu.models.load import load

    source, *activations = sys.argv[1:]
    model = load(source, activations=activations[0] if activations else None)
    if not isinstance(model, Decoder):
        compile_later_kernels(model)
