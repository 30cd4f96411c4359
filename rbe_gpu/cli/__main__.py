"""`python -m rbe_gpu.cli` is the `rbe-gpu` command."""

from . import main

main()
