"""Every op once: import, compile, launch at a small size, compare. If this fails, nothing else is worth trying.

    python -m rbe_gpu.reports.gpu.launch --model FOLDER OP ...     these ops, one JSON line each

The ops are spread over several processes, which compile at once; a kernel that breaks the GPU's context ends only its
own process. The stages that follow compile what they launch with other configurations.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import rbe_gpu as rbe
from rbe_gpu import reference, registry
from rbe_gpu.blocks import RBEMatrix
from rbe_gpu.codecs import GridCodes
from rbe_gpu.gpu import _source, linear_few

from ..harness import token_ids
from ..harness.baselines import Folder
from ..harness.measure import WrongResult, check, to_numpy
from ..harness.process import child_environment
from . import device
from .bandwidth import OURS_OF, Arrays, Pass, expected_rows, host_operands
from .device import described
from .stage import FAILED, PASSED, STOPPED, Options, Result, finish, kill, module_command, start

MODULE = "rbe_gpu.reports.gpu.launch"
#: sources of their own, beside `linear`
FEW, TRANSFORM, INTEGERS = "linear_few", "linear_transform", "linear_integers"
#: the slowest to compile first, so that each has a process of its own
ORDER = ("attention", TRANSFORM, INTEGERS, FEW, "linear", "decode", "embedding")
COLS, NBYTES = 256, 1 << 16  # of x
DTYPE = "float16"


def names() -> list[str]:
    """The ops that have CUDA kernels, and the other sources of `linear`."""
    known = [op for op in (*registry.OPS, FEW, TRANSFORM, INTEGERS) if _source.has(op)]
    return sorted(known, key=lambda op: ORDER.index(op) if op in ORDER else len(ORDER))


def run(options: Options, result: Result) -> None:
    """All ops, in `options.jobs` processes."""
    model = str(token_ids.model_folder(options.model).resolve())
    ops = names()
    groups = [ops[i :: options.jobs] for i in range(min(options.jobs, len(ops)))]
    stop = time.perf_counter() + options.seconds - result.seconds
    processes = []
    for group in groups:
        log = options.out / f"launch-{group[0]}.log"
        command = module_command(options, MODULE, "--model", model, *group)
        processes.append((group, log, start(command, log, environment=child_environment())))
    try:
        gpu = device.open_device(options)  # imports PyTorch while the others compile
        result.say(gpu.session.device)
        result.say(gpu.session.versions)
        ends = set()
        for group, log, process in processes:
            status = finish(process, stop - time.perf_counter())
            ends.add(judge(group, status, log, result))
    finally:
        for *_, process in processes:
            kill(process)
    result.end(next(e for e in (FAILED, STOPPED, PASSED) if e in ends))


def judge(group: Sequence[str], status: int | None, log: Path, result: Result) -> str:
    """Report the ops of one process. Returns whether they passed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"op"')]
    done: dict[str, dict[str, Any]] = {one["op"]: one for one in lines}
    passed = True
    for op in group:
        one = done.get(op)
        if one is None:
            last = (text.strip().splitlines() or ["it printed nothing"])[-1]
            end = "stopped" if status is None else f"ended with {status}"
            result.say(f"{op}: not reached; its process {end}: {last[:200]}")
            passed &= status is None
            continue
        result.fact(op, one)
        passed &= one["failed"] is None
        outcome = one["failed"] or f"relative error {one['error']:.2g}"
        result.say(f"{op}: {outcome}; first call {one['first']:.1f} s, second {one['second']:.2f} s")
    if status is None and passed:
        return STOPPED
    return PASSED if passed else FAILED


# --- one process ----------------------------------------------------------------------------------------


def calls(cupy: Any, folder: Folder) -> Mapping[str, Callable[[], tuple[Any, Any]]]:
    """By op: a function that returns its result on the GPU, and what it must be, in float64."""
    values = folder.tensor("embeddings.word_embeddings.weight")[1000:1100].reshape(-1)
    arrays = Arrays(values, folder)
    dtype = registry.DTYPES[DTYPE]

    def of(shape: tuple[int, ...], shift: int = 0) -> Any:
        return arrays.rows(shape, DTYPE, shift)

    def one_pass(op: str) -> tuple[Any, Any]:
        host = host_operands(Pass(op, COLS, DTYPE), arrays, NBYTES)
        there = host.moved_to(cupy.asarray)
        return OURS_OF[op](there), expected_rows(op, host, list(range(len(host.out))))

    def attention() -> tuple[Any, Any]:
        q, k, v = (of((1, 96, 2, 64), shift) for shift in (0, 5, 11))
        y = rbe.attention(cupy.asarray(q), cupy.asarray(k), cupy.asarray(v), causal=True)
        return y, reference.attention(q, k, v, causal=True)

    weight = np.resize(folder.tensor("encoder.layer.0.intermediate.dense.weight"), (128, 256))

    def decode() -> tuple[Any, Any]:
        m: Any = rbe.compress(weight, codes="dense-int4", block=64, basis=False)
        return rbe.decode(rbe.to(m, "cuda"), dtype), reference.decode(m)

    def linear(codes: str, tokens: int, method: str | None) -> tuple[Any, Any]:
        density = 0.25 if codes.startswith("sparse") else None
        m: Any = rbe.compress(weight, codes=codes, block=64, basis=False, density=density)
        x = of((tokens, 256))
        y = rbe.linear(cupy.asarray(x), rbe.to(m, "cuda"), method=method)
        return y, reference.linear(x, reference.decode(m))

    def few() -> tuple[Any, Any]:
        """linear_few_dot and linear_few_mma, results one below the other; twice: the counters must be zero again.

        The last is one split of 512 columns, as of 4096 x 4096: 48 KB of dynamic shared memory beside the static.
        """
        wide = np.resize(weight, (128, 512))
        m: Any = rbe.compress(wide, codes="dense-int4", block=64, basis=False)
        there, workspace, out = rbe.to(m, "cuda"), rbe.Workspace(), cupy.empty((4 + 16 + 16, 128), dtype)
        xs = of((4, 512)), of((16, 512)), of((16, 512), 7)
        for _ in range(2):
            rbe.linear(cupy.asarray(xs[0]), there, out=out[:4], workspace=workspace)
            rbe.linear(cupy.asarray(xs[1]), there, out=out[4:20], workspace=workspace)
            with mock.patch.object(linear_few, "_BLOCKS_WANTED", 1):
                rbe.linear(cupy.asarray(xs[2]), there, out=out[20:], workspace=workspace)
        return out, np.concatenate([reference.linear(x, reference.decode(m)) for x in xs])

    def grid_weight() -> Any:
        """The same values as grid codes of 4 bits: a scale of each row, column scales of 1."""
        step = np.abs(weight).max(axis=1) / 7
        q = np.rint(weight / step[:, None]).astype(np.int8)
        return RBEMatrix(weight.shape, 64, "none", 1.0, None, GridCodes.from_integers(q, step, np.ones(256)))

    def integers() -> tuple[Any, Any]:
        """All three matmuls with int8 activations, results one below the other."""
        dense: Any = rbe.compress(weight, codes="dense-int4", transform="none", basis=False)
        xs = [
            of((tokens, 256)) for tokens in (16, 72)
        ]  # linear_integers_few; linear_integers_groups or _tiles
        out = cupy.empty((2 * (16 + 72), 128), dtype)
        start, expected = 0, []
        for m in (dense, grid_weight()):
            for x in xs:
                y = out[start : start + len(x)]
                rbe.linear(cupy.asarray(x), rbe.to(m, "cuda"), out=y, activation_bits=8)
                expected.append(reference.linear_int8(x, m))
                start += len(x)
        return out, np.concatenate(expected)

    return {
        **{op: partial(one_pass, op) for op in OURS_OF},
        "attention": attention,
        "decode": decode,
        FEW: few,
        "linear": partial(linear, "dense-int4", 40, None),
        TRANSFORM: partial(linear, "sparse-int4", 40, "transform"),
        INTEGERS: integers,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("ops", nargs="+", metavar="OP")
    chosen = parser.parse_args(arguments)
    import cupy

    cupy.cuda.runtime.free(0)  # creates the context
    of = calls(cupy, Folder(chosen.model))
    for op in chosen.ops:
        one: dict[str, Any] = {"op": op, "first": 0.0, "second": 0.0, "error": None, "failed": None}
        try:
            for name in ("first", "second"):  # the first call compiles
                began = time.perf_counter()
                output, expected = of[op]()
                host = to_numpy(output)
                one[name] = time.perf_counter() - began
            tol = registry.OPS["linear" if op in (FEW, TRANSFORM, INTEGERS) else op].tolerances[DTYPE]
            one["error"] = check(op, host, expected, tol.rel, tol.floor)
        except WrongResult as error:
            one["failed"] = str(error)
        except Exception as error:  # of any kernel and library: the other ops go on
            one["failed"] = described(error)
        print(json.dumps(one), flush=True)
        if one["failed"] is not None:
            try:
                cupy.cuda.Device().synchronize()
            except Exception as error:
                print(f"the GPU's context is broken: {error}", flush=True)
                os._exit(3)


if __name__ == "__main__":
    main()
