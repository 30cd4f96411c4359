"""Names of providers and cases in the rows: `reports/speed` measures under them, `targets.py` refers to them."""

from __future__ import annotations

from .measure import OURS

DENSE, DENSE_NEW = f"{OURS} dense", f"{OURS} dense, no out="

# --- linear

#: density of the sparse weights
KEPT = (0.05, 0.12, 0.25, 0.5)
#: end of the name of a case whose baseline multiplies with the decoded weight
DECODED = ", decoded once"
#: end of the name of a provider that keeps no decoded weight
LEAN = ", nothing kept"
DENSE4 = f"{OURS} dense-int4"


def sparse(density: float) -> str:
    """The provider of a weight of this density."""
    return f"{OURS} sparse-int8, {density:.0%} kept"


# --- model

BATCH = 32
MODEL = f"{BATCH} texts"
#: the same with models that keep no decoded weight between batches
MODEL_LEAN = f"{MODEL}, nothing kept"
MODEL_MEMORY = "memory of the weights"
#: density of the setting that is measured for its speed
FAST_DENSITY = 0.12
FAST = f"{FAST_DENSITY:.0%} kept"
#: how tables and texts name it
FAST_SHOWN = f"density {FAST_DENSITY:.0%}"
