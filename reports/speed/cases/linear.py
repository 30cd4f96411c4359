"""y = x W^T + b: dense and compressed weights against PyTorch and NumPy, and against a weight decoded once.

The model's own shapes, and larger ones tiled from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks

from ...harness.baselines import F32, torch_or_none
from ...harness.inputs import Inputs
from ...harness.measure import builds
from ...harness.row_names import DECODED, DENSE4, DENSITIES, LEAN, WIDE, sparse
from . import DENSE, DENSE_NEW, NUMPY, ORIGINAL_TIME, OURS, TORCH, Case, Provider

#: provider -> how the weight is compressed. A basis does not pay here; the encoder need not search for one
CODES: dict[str, dict[str, Any]] = {
    f"{OURS} dense-int8": {"codes": "dense-int8", "basis": False},
    DENSE4: {"codes": "dense-int4", "basis": False},
    **{sparse(d): {"codes": "sparse-int8", "density": d, "basis": False} for d in DENSITIES},
}
#: the same for what must never be slower than the decoded weight
FORMS: dict[str, dict[str, Any]] = {
    **{f"{OURS} grade {g}": {"grade": g, "basis": False} for g in "SABC"},
    **{sparse(d): CODES[sparse(d)] for d in DENSITIES},
}
FEW_FORMS = (f"{OURS} grade B", sparse(0.12))
#: seconds of the original system's 768 x 768 layer, with an output buffer and without; it named no number of tokens
ORIGINAL = 1.2e-3, 0.9e-3


def cases(inputs: Inputs, quick: bool = False) -> Iterator[Case]:
    bias = np.concatenate([inputs.bias(0, "attention.self.query"), inputs.bias(0, "attention.self.key")])
    up_bias = inputs.bias(0, "intermediate.dense")
    square = inputs.square()
    if inputs.wide is not None:
        wide = inputs.wide
        yield from _dense_and_compressed(
            wide.weight, wide.bias, wide.rows, (64,), {DENSE4: CODES[DENSE4]}, WIDE, ORIGINAL
        )
    if quick:
        yield from _dense_and_compressed(square, bias, inputs.wide_rows, (64,), CODES)
        yield from _decoded_once(square, bias, inputs.wide_rows, (16,), {n: FORMS[n] for n in FEW_FORMS})
        return
    yield from _dense_and_compressed(square, bias, inputs.wide_rows, (1, 64, 512), CODES)
    # the inputs of a layer's FFN are close to those of the next layer: both are the output of a norm
    up = inputs.weight(0, "intermediate.dense")
    yield from _dense_and_compressed(up, up_bias, lambda n: inputs.rows("1.x", n), (512,), CODES)
    yield from _dense_and_compressed(inputs.tall(), np.tile(up_bias, 2), inputs.wide_rows, (64, 512), CODES)
    broad, broad_bias = inputs.broad(), np.resize(up_bias, 4096)
    yield from _dense_and_compressed(broad, broad_bias, inputs.broad_rows, (1, 64, 128), CODES)
    yield from _decoded_once(square, bias, inputs.wide_rows, (1, 16, 64, 512), FORMS)
    few = {name: FORMS[name] for name in FEW_FORMS}  # each holds a decoded weight of 67 MB
    yield from _decoded_once(broad, broad_bias, inputs.broad_rows, (1, 16, 128), few)


def _numpy(x: F32, weight: F32, bias: F32) -> Callable[[], F32]:
    out: F32 = np.empty((len(x), len(weight)), np.float32)

    def run() -> F32:
        np.matmul(x, weight.T, out=out)
        np.add(out, bias, out=out)
        return out

    return run


def title(x: F32, weight: F32) -> tuple[str, str]:
    """A case's name and shape."""
    out_features, in_features = weight.shape
    name = f"{out_features}x{in_features}, {len(x)} token{'s' * (len(x) != 1)}"
    return name, f"({len(x)}, {in_features}) x ({out_features}, {in_features})"


def _facts(m: RBEBlocks, weight: F32) -> dict[str, tuple[float, str]]:
    error = m.error_report(weight).relative_error
    return {"weight_error": (error, ""), "bits_per_weight": (m.bits_per_weight, "bit")}


def _dense_and_compressed(
    weight: F32,
    bias: F32,
    rows: Callable[[int], F32],
    tokens: tuple[int, ...],
    codes: Mapping[str, Mapping[str, Any]],
    suffix: str = "",
    original: tuple[float, float] | None = None,
) -> Iterator[Case]:
    """The dense weight and compressed ones, no decoded weight cached, against NumPy and PyTorch on the dense weight.

    rows : number of tokens -> activations
    suffix : of the case's name
    original : seconds of the original system with an output buffer and without; compressed weights are then measured
        both ways
    """
    forms = [
        (name, m := rbe.compress(weight, **options), _facts(m, weight))
        for name, options in (codes.items() if builds(OURS) else ())
    ]
    torch = torch_or_none()
    for count in tokens:
        x = rows(count)
        out = np.empty((count, len(weight)), np.float32)
        workspace = rbe.Workspace()
        numpy = _numpy(x, weight, bias)
        expected = numpy().copy()
        providers = {NUMPY: Provider([numpy])}
        if torch is not None:
            providers[TORCH] = Provider([_in_torch(torch, x, weight, bias)], expected)

        def ours(w: Any, with_out: bool = True, x: F32 = x, out: F32 = out, ws: Any = workspace) -> Any:
            """A matmul with a dense or a compressed weight, into `out` or into a new array."""
            if with_out:
                return lambda: rbe.linear(x, w, bias, out=out, workspace=ws)
            return lambda: rbe.linear(x, w, bias)

        providers[DENSE] = Provider([ours(weight)], expected)
        providers[DENSE_NEW] = Provider([ours(weight, False)], expected)
        name, shape = title(x, weight)
        for provider, m, facts in forms:
            right = x @ m.decode().T + bias
            providers[provider] = Provider([ours(m)], right, facts=facts)
            if original is not None:
                with_out, without_out = ({ORIGINAL_TIME: (seconds, "s")} for seconds in original)
                providers[provider] = Provider([ours(m)], right, facts={**facts, **with_out})
                providers[f"{provider}, no out="] = Provider([ours(m, False)], right, facts=without_out)
        yield Case("linear", name + suffix, shape, providers)


def _in_torch(torch: Any, x: F32, weight: F32, bias: F32) -> Callable[[], Any]:
    tx, tw, tb = (torch.from_numpy(a) for a in (x, weight, bias))

    def run() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.linear(tx, tw, tb)

    return run


def _decoded_once(
    weight: F32,
    bias: F32,
    rows: Callable[[int], F32],
    tokens: tuple[int, ...],
    forms: Mapping[str, Mapping[str, Any]],
) -> Iterator[Case]:
    """The algorithm that is chosen by default, with a cache that has room for all and without one, against NumPy with
    the decoded weight.

    A decoded weight is a dense one, whatever it was decoded from: NumPy's matmul with one stands for all. Its
    decoding is not timed; neither is the filling of the caches, which the check of the result does.
    """
    chosen = [*forms.items()][: None if builds(OURS) else 1]
    compressed = [(name, m := rbe.compress(weight, **options), _facts(m, weight)) for name, options in chosen]
    caches = {name: rbe.PanelCache(2 * m.dense_nbytes) for name, m, _ in compressed}
    for count in tokens:
        x = rows(count)
        out = np.empty((count, len(weight)), np.float32)
        workspace = rbe.Workspace()
        providers = {NUMPY: Provider([_numpy(x, compressed[0][1].decode(), bias)])}
        for name, m, facts in compressed:
            expected = x @ m.decode().T + bias
            for cache, provider in ((caches[name], name), (None, name + LEAN)):

                def run(
                    m: RBEBlocks = m, cache: Any = cache, x: F32 = x, out: F32 = out, ws: Any = workspace
                ) -> Any:
                    return rbe.linear(x, m, bias, out=out, workspace=ws, cache=cache)

                providers[provider] = Provider([run], expected, facts=facts)
        case, shape = title(x, weight)
        yield Case("linear", case + DECODED, shape, providers)
