"""What the ops of a piece of code cost: calls, time, bytes and matmul algorithms.

While a profile is active, the functions that `dispatch.Backend` has for its ops are wrapped, as are the one-call
steps of encoders and decoders. Nothing else in the package knows of it: without a profile, no line of it runs.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from math import prod
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np

from . import dispatch, output
from .blocks import RBEBlocks
from .dispatch import Backend
from .matmul import PreparedInput, algorithms_of
from .registry import OPS

#: calls that run all layers of a model: (kind, module, class, method)
_STEPS = (
    ("encoder_step", "rbe_gpu.cpu_fallback.encoder_step", "EncoderStep", "run"),
    ("decoder_step", "rbe_gpu.cpu_fallback.decoder_step", "DecoderStep", "run"),
    ("cuda_graph", "rbe_gpu.gpu.graph", "Graph", "__call__"),
)
_MICRO = 1e-3  # nanoseconds to the microseconds of a trace


@dataclass
class Call:
    """One call of an op, or of a step that runs all layers of a model.

    Attributes
    ----------
    op : name of the op, or "encoder_step", "decoder_step", "cuda_graph"
    backend : "cpu" or "cuda"
    algorithm : of a matmul, the algorithm chosen for it; "" elsewhere
    shape : shape of the first array, or of the compressed weight
    nbytes : bytes of all operands and results, each counted once
    thread : identifier of the thread that called
    start, end : nanoseconds of `time.perf_counter_ns`; on a GPU the end of the launch, not of the kernel
    own : nanoseconds without those of the calls inside this one
    events : on a GPU, the CUDA events before and after the launch; None on the CPU, and in the capture of a graph
    """

    op: str
    backend: str
    algorithm: str
    shape: tuple[int, ...]
    nbytes: int
    thread: int
    start: int
    end: int = 0
    own: int = 0
    events: tuple[Any, Any] | None = field(default=None, repr=False)

    @property
    def device_seconds(self) -> float | None:
        """Time between the two events; waits for the second one."""
        if self.events is None:
            return None
        self.events[1].synchronize()
        return _between(*self.events)


@dataclass(frozen=True)
class OpTotals:
    """All calls of an op with one algorithm on one backend.

    Attributes
    ----------
    seconds : on the host, without the calls inside these
    device_seconds : on a GPU; None where none was measured
    nbytes : of all calls together
    """

    op: str
    backend: str
    algorithm: str
    calls: int
    seconds: float
    device_seconds: float | None
    nbytes: int


class Profile:
    """The calls of ops made while it was active; made by `rbe_gpu.profile`.

    Attributes
    ----------
    calls : every call, in the order in which they ended
    seconds : from the start of the `with` block to its end
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.seconds = 0.0
        self._began = 0

    def __enter__(self) -> Profile:
        if self._began:
            raise RuntimeError("this profile has been used; make another with rbe_gpu.profile()")
        _activate(self)
        self._began = perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = (perf_counter_ns() - self._began) / 1e9
        _deactivate(self)

    def totals(self) -> list[OpTotals]:
        """The calls by op, backend and algorithm; those that took the longest first."""
        groups: defaultdict[tuple[str, str, str], list[Call]] = defaultdict(list)
        for call in self.calls:
            groups[call.op, call.backend, call.algorithm].append(call)
        totals = []
        for key, calls in groups.items():
            on_device = [c.device_seconds for c in calls if c.device_seconds is not None]
            totals.append(
                OpTotals(
                    *key,
                    len(calls),
                    sum(c.own for c in calls) / 1e9,
                    sum(on_device) if on_device else None,
                    sum(c.nbytes for c in calls),
                )
            )
        return sorted(totals, key=lambda t: -(t.device_seconds or t.seconds))

    @property
    def outside_seconds(self) -> float:
        """Time of the `with` block outside of all ops; may be negative where several threads called ops at once."""
        return self.seconds - sum(c.own for c in self.calls) / 1e9

    def table(self) -> str:
        """The totals as a table in plain text.

        "time" is host time in the backend, without the calls inside; the last lines are the time outside of ops
        (checks of arguments, tokenizer, Python) and the whole. "moved" are the bytes of operands and results, each
        once, and "GB/s" those bytes by the time.
        """
        totals = self.totals()
        on_gpu = any(t.device_seconds is not None for t in totals)
        heads = ["op", "algorithm", "calls", "time ms", "share", "mean us", "moved MB", "GB/s"]
        if on_gpu:
            heads.insert(6, "GPU ms")
        lines = [heads]
        for t in totals:
            took = t.seconds if t.device_seconds is None else t.device_seconds
            name = t.op if t.backend == "cpu" else f"{t.op} ({t.backend})"
            device = "" if t.device_seconds is None else f"{1e3 * t.device_seconds:.3f}"
            lines.append(
                [
                    name, t.algorithm, str(t.calls), f"{1e3 * t.seconds:.3f}", _share(t.seconds, self.seconds),
                    f"{1e6 * t.seconds / t.calls:.1f}", *[device] * on_gpu, f"{t.nbytes / 1e6:.3f}",
                    f"{t.nbytes / took / 1e9:.2f}" if took else "",
                ]
            )  # fmt: skip
        rest = [""] * (len(heads) - 5)
        outside = self.outside_seconds
        lines.append(["outside of ops", "", "", f"{1e3 * outside:.3f}", _share(outside, self.seconds), *rest])
        lines.append(["all", "", str(len(self.calls)), f"{1e3 * self.seconds:.3f}", "100.0%", *rest])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )  # fmt: skip
        return "\n".join(line.rstrip() for line in padded)

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the calls as a trace for https://ui.perfetto.dev or chrome://tracing.

        Threads of the host are rows of one process, and on a GPU its kernels are a row of another. Raises `OSError`
        where the file cannot be written.
        """
        threads = {t: i for i, t in enumerate(dict.fromkeys(c.thread for c in self.calls), 1)}
        launched = min((c for c in self.calls if c.events is not None), key=lambda c: c.start, default=None)
        events = [_metadata("process_name", 1, 0, "host")]
        events += [_metadata("thread_name", 1, i, f"thread {i}") for i in threads.values()]
        if launched is not None:
            events.append(_metadata("process_name", 2, 0, "GPU"))
        for c in sorted(self.calls, key=lambda c: c.start):
            details = {"shape": list(c.shape), "bytes": c.nbytes, "backend": c.backend}
            if c.algorithm:
                details["algorithm"] = c.algorithm
            event = {"name": c.op, "cat": "op", "ph": "X", "args": details}
            start, took = (c.start - self._began) * _MICRO, (c.end - c.start) * _MICRO
            events.append({**event, "pid": 1, "tid": threads[c.thread], "ts": start, "dur": took})
            on_device = c.device_seconds
            if (
                on_device is not None
                and c.events is not None
                and launched is not None
                and launched.events is not None
            ):
                # CUDA events know the times between each other alone: the first one is placed at its launch
                placed = (launched.start - self._began) * _MICRO + 1e6 * _between(
                    launched.events[0], c.events[0]
                )
                events.append({**event, "pid": 2, "tid": 0, "ts": placed, "dur": 1e6 * on_device})
        output.write_text(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def profile() -> Profile:
    """Record what the ops cost inside a `with` block.

    >>> with rbe.profile() as p:
    ...     vectors = model.embed(texts)
    >>> print(p.table())
    >>> p.chrome_trace("trace.json")  # for https://ui.perfetto.dev

    Ops are counted wherever they are called from: functions, layers, models, and from any thread of this process. A
    step that runs all layers of a model in one call is one op: "encoder_step" (a few tokens through an encoder),
    "decoder_step" (one token through a decoder), "cuda_graph". First calls compile kernels: run the code once before.
    Profiles may be nested. Ops that have been captured in a CUDA graph are seen as the graph alone.

    The time of a call is that in the backend, without the checks of its arguments. On a GPU, where calls return
    before kernels have run, it is the time of the launch; the kernels' own time is measured with CUDA events, and
    each op is an NVTX range for Nsight Systems. Bytes are those of the arguments and results, each counted once,
    compressed weights as stored: the least that a call has to move. Of tables of embeddings and rotations the rows
    that are read count; attention counts all keys and values that it is passed, masked or not. The algorithm of a
    matmul is the one chosen for its shape; an input with NaN, Inf or huge values is multiplied with decoded panels.

    Returns
    -------
    Profile, with `table()`, `chrome_trace(path)`, `totals()`, `calls` and `seconds`. A profile is used once;
    entering it again raises `RuntimeError`.
    """
    return Profile()


def _between(before: Any, after: Any) -> float:
    """Seconds between two CUDA events."""
    return float(dispatch.CUDA.xp.cuda.get_elapsed_time(before, after)) / 1e3


def _metadata(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


# --- bytes and algorithms ---------------------------------------------------------------------------------


def _bytes_of(value: Any) -> int:
    """Bytes of an array or compressed weight, of all arrays of a tuple; 0 for anything else."""
    if isinstance(value, RBEBlocks):
        return int(value.nbytes)
    if isinstance(value, tuple):
        return sum(map(_bytes_of, value))
    if isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__"):
        # an axis that was broadcast has no memory of its own
        held = prod(n for n, s in zip(value.shape, value.strides, strict=True) if s or not n)
        return int(value.dtype.itemsize * held)
    return 0


def _moved_bytes(op: str, args: Sequence[Any]) -> int:
    """Bytes of the operands and results of a call to a backend."""
    parts = [0 if isinstance(a, PreparedInput) else _bytes_of(a) for a in args]
    if op == "embedding":  # ids, weight
        parts[1] = parts[1] * min(args[0].size, args[1].shape[0]) // max(1, args[1].shape[0])
    elif op == "rope":  # x, cos, sin
        tokens = prod(args[0].shape[:-2])
        for i in (1, 2):
            parts[i] = parts[i] * min(tokens, args[i].shape[0]) // max(1, args[i].shape[0])
    return sum(parts)


def _algorithm(backend: Backend, op: str, args: Sequence[Any]) -> str:
    """The matmul algorithm that is chosen for a call of `linear`."""
    if op != "linear" or not args[5].size:  # without a result, nothing is chosen
        return ""
    x, weight, cache, method, bits = args[0], args[1], args[7], args[8], args[10]
    return algorithms_of(backend).choose(weight, x.shape[0], x.dtype, cache, method, bits).name


# --- wrapping ---------------------------------------------------------------------------------------------

_lock = threading.Lock()
_active: list[Profile] = []
_stack = threading.local()
_restore: list[Callable[[], None]] = []


def _activate(profile: Profile) -> None:
    with _lock:
        if not _active:
            _wrap()
        _active.append(profile)


def _deactivate(profile: Profile) -> None:
    with _lock:
        _active.remove(profile)
        if not _active:
            while _restore:
                _restore.pop()()


def _wrap() -> None:
    for backend in (dispatch.CPU, dispatch.CUDA):
        for op in OPS:
            _wrap_op(backend, op)
    for kind, module, owner, method in _STEPS:
        _wrap_step(kind, getattr(import_module(module), owner), method)


def _wrap_op(backend: Backend, op: str) -> None:
    loaded = backend.__dict__.get(op)
    resolve = getattr(type(backend), op).resolve

    def call(*args: Any) -> Any:
        function = loaded or resolve(backend)
        shape = next((tuple(a.shape) for a in args if hasattr(a, "shape")), ())
        record = Call(op, backend.name, "", shape, _moved_bytes(op, args), threading.get_ident(), 0)
        result = _timed(record, lambda: function(*args))
        record.algorithm = _algorithm(backend, op, args)
        return result

    def restore() -> None:
        if loaded is None:
            delattr(backend, op)
        else:
            setattr(backend, op, loaded)

    setattr(backend, op, call)
    _restore.append(restore)


def _wrap_step(kind: str, owner: type, method: str) -> None:
    function = getattr(owner, method)
    backend = "cuda" if kind == "cuda_graph" else "cpu"

    @wraps(function)
    def call(step: Any, *args: Any) -> Any:
        record = Call(kind, backend, "", (), getattr(step, "weight_bytes", 0), threading.get_ident(), 0)
        result = _timed(record, lambda: function(step, *args))
        if result is False:  # the caller repeats it
            record.algorithm = "not finite: op by op"
        return result

    setattr(owner, method, call)
    _restore.append(lambda: setattr(owner, method, function))


def _timed(call: Call, run: Callable[[], Any]) -> Any:
    """Run a call and record it in all active profiles, also if it raises."""
    inside: list[int] = _stack.__dict__.setdefault("inside", [])
    inside.append(0)
    nvtx = None if call.backend == "cpu" else _before_launch(call)
    call.start = perf_counter_ns()
    try:
        return run()
    finally:
        call.end = perf_counter_ns()
        if call.events is not None:
            call.events[1].record()
        if nvtx is not None:
            nvtx.RangePop()
        took = call.end - call.start
        call.own = took - inside.pop()
        if inside:
            inside[-1] += took
        with _lock:
            for profile in _active:
                profile.calls.append(call)


def _before_launch(call: Call) -> Any:
    """Open an NVTX range and record an event on CuPy's current stream; the module that closes the range, or None."""
    cuda = dispatch.CUDA.xp.cuda
    if not cuda.get_current_stream().is_capturing():  # a captured event has no time
        call.events = cuda.Event(), cuda.Event()
        call.events[0].record()
    if not cuda.nvtx.available:
        return None
    cuda.nvtx.RangePush(f"rbe.{call.op}")
    return cuda.nvtx
