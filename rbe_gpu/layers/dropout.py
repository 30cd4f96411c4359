"""RBEDropout: y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i]."""

from __future__ import annotations

from .. import ops
from ..blocks import Array
from ..workspace import Workspace


class RBEDropout:
    """y[i] = x[i] / (1 - p) where element i is kept, else 0; plus residual[i]. In evaluation mode,
    y = x + residual.

    The masks are those of Philox4x32-10 with key `seed`. Each call in training mode consumes ceil(n / 4) blocks of
    the stream and advances `offset` past them, so that no two calls share random numbers; resetting `offset`
    replays a mask. A new layer is in training mode.

    Parameters
    ----------
    p : probability of dropping, 0 <= p <= 1
    seed : 0 <= seed < 2^64

    Attributes
    ----------
    offset : the next Philox block, 0 at first
    training : see `train` and `eval`
    """

    def __init__(self, p: float = 0.1, seed: int = 0) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p={p} is not a probability; use 0 to 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is out of range; use 0 to 2**64 - 1")
        self.p = p
        self.seed = seed
        self.offset = 0
        self.training = True

    @property
    def nbytes(self) -> int:
        """0: the layer has no weights."""
        return 0

    def train(self, mode: bool = True) -> RBEDropout:
        """Set training mode, or with `mode=False` evaluation mode. Returns the layer."""
        self.training = mode
        return self

    def eval(self) -> RBEDropout:
        """Set evaluation mode: nothing is dropped. Returns the layer."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        residual: Array | None = None,
        out: Array | None = None,
        workspace: Workspace | None = None,
    ) -> Array:
        """x, residual : any one shape. Returns like x; in evaluation mode, without residual and out, x itself."""
        if not self.training:
            if residual is None and out is None:
                return x
            if residual is None:
                return ops.dropout(x, 0.0, self.seed, out=out)
            return ops.add(x, residual, out=out)
        y = ops.dropout(x, self.p, self.seed, self.offset, residual, out=out)
        self.offset = (self.offset + -(-x.size // 4)) % 2**64
        return y

    def __repr__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"RBEDropout(p={self.p:g}, seed={self.seed}, offset={self.offset}, {mode})"
