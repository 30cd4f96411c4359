"""Names of providers and cases in the rows: `reports/speed` measures under them, `targets.py` refers to them."""

from __future__ import annotations

from .measure import OURS

DENSE, DENSE_NEW = f"{OURS} dense", f"{OURS} dense, no out="

#: end of the name of a case on weights and activations of all-mpnet-base-v2
WIDE = ", all-mpnet-base-v2"

# --- linear

#: of the sparse weights
DENSITIES = (0.05, 0.12, 0.25, 0.5)
#: end of the name of a case whose baseline multiplies with the decoded weight
DECODED = ", decoded once"
#: end of the name of a provider that caches no decoded weight
LEAN = ", no cache"
DENSE4 = f"{OURS} dense-int4"


def sparse(density: float) -> str:
    """The provider of a weight of this density."""
    return f"{OURS} sparse-int8, density {density:.0%}"


# --- model

BATCH = 32
MODEL = f"{BATCH} texts"
#: the same with models that cache no decoded weight between batches
MODEL_LEAN = f"{MODEL}, no cache"
MODEL_MEMORY = "memory of the weights"
#: metric of the peak memory of a whole process
PEAK = "process_peak"
#: density of the setting that is measured for its speed
FAST_DENSITY = 0.12
FAST = f"density {FAST_DENSITY:.0%}"
