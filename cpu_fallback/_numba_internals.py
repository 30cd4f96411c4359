"""Everything that this package uses of Numba's private parts. Tested on Numba 0.68.1 with llvmlite 0.50.0.

A new minor version of Numba may change any of these, so pyproject.toml has an upper bound: raise it, and the line
above, when the tests pass on the new version (`tests/test_threads.py`, `test_parts.py` and `test_simd.py` cover this
file).

    what                                  why
    kept_as, _KernelCache, cache_folder   the disk cache knows one source file per kernel, numbers its files, and
                                          raises where it finds no folder or no room
    PRECOMPILED, merge_precompiled        kernels that a wheel brings: such a cache, which is only read
    share_function                        kernels on several threads without a parallel loop of Numba's
    start_threads, renew_locks, ...       Numba's number of threads, and its locks in a forked process
    target_context                        what `isa` selects
    InlineDispatcher                      inlined functions are compiled by themselves, too
    compiler_lock                         one Python thread compiles at a time
    during_compilation                    what a user is told who waits for it
    cgutils, populate_array               code generation: what Numba's own intrinsics are written with
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import stat
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import numba.np.ufunc.parallel as layers
from llvmlite import ir
from numba import types
from numba.core import caching, ccallback, cgutils, codegen, compiler, event, registry
from numba.core import dispatcher as dispatcher_module
from numba.core.compiler_lock import global_compiler_lock as compiler_lock
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

_I64 = ir.IntType(64)

__all__ = ["cgutils", "compiler_lock", "populate_array"]


def target_context() -> Any:
    """The context that Numba compiles for the CPU with."""
    return registry.cpu_target.target_context


class _CompileListener(event.Listener):  # type: ignore[misc]
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_start(self, event: Any) -> None:
        self._call()

    def on_end(self, event: Any) -> None:
        self._call()


@contextmanager
def during_compilation(call: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever the compilation of one begins or ends; kernels in the disk cache are not compiled."""
    with event.install_listener("numba:compile", _CompileListener(call)):
        yield


# --- functions that are only inlined ---------------------------------------------------------------------

_numbers = itertools.count()


class _LinkedCode(codegen.JITCodeLibrary):  # type: ignore[misc]
    """The code of a function that is linked into its callers, where LLVM optimises and compiles it."""

    @property
    def codegen(self) -> Any:
        return _CodegenWithoutEngine(self._codegen)

    def _optimize_functions(self, module: Any) -> None:
        super()._optimize_functions(module)
        for function in module.functions:
            if not function.is_declaration and b"alwaysinline" not in b" ".join(function.attributes):
                function.add_function_attribute("noinline")

    def _optimize_final_module(self) -> None:
        """Left to the callers."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _CodegenWithoutEngine:
    """A codegen for code that the execution engine does not hold."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def set_env(self, name: str, environment: Any) -> None:
        """The engine has no such variable; only code that raises or calls Python reads it."""


class _InlineCompiler(compiler.Compiler):  # type: ignore[misc]
    """Compiles a function for its callers alone: no wrappers for Python and for C, and no machine code of its own.

    That halves the time to compile a kernel: LLVM optimised and compiled every function that is inlined, too, and
    its wrapper.
    """

    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        if library is None:
            library = _LinkedCode(target.codegen(), f"rbe_gpu.inline.{next(_numbers)}")
        super().__init__(typing, target, library, *rest)


class InlineDispatcher(registry.CPUDispatcher):  # type: ignore[misc]
    """A function that compiled functions call, and Python cannot.

    Parameters
    ----------
    function : Python function
    **options : of `numba.njit`
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        options |= {
            "nopython": True,
            "boundscheck": None,
            "no_cpython_wrapper": True,
            "no_cfunc_wrapper": True,
        }
        super().__init__(function, {}, options, pipeline_class=_InlineCompiler)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.py_func.__qualname__} has no machine code of its own; only kernels call it")


# --- the disk cache -------------------------------------------------------------------------------------

#: Kernels compiled when the package was built (`build_kernels.py`); only wheels for one platform have this folder.
PRECOMPILED = Path(__file__).parent / "precompiled"
#: What an index of the disk cache says of its source file. Names in the cache hold a digest of the sources instead.
_STAMP = "precompiled"

#: What code is generated for: LLVM triple, CPU name, features.
Target = tuple[str, str, str]

_warned = False


def _warn_once(message: str, advice: str = "set NUMBA_CACHE_DIR to a writable folder") -> None:
    global _warned
    if not _warned:
        _warned = True
        text = f"{message}; {advice}"
        warnings.warn_explicit(text, RuntimeWarning, "rbe_gpu", 1)  # one line: no source line belongs to it


@cache
def _temporary_folder() -> str:
    """A folder that outlives the process, for the user alone: what it holds will be run.

    Raises
    ------
    OSError : there is no folder for temporary files, or somebody else has made this one
    """
    getuid = getattr(os, "getuid", int)  # Windows has a temporary folder for each user
    folder = os.path.join(tempfile.gettempdir(), f"rbe_gpu-kernels-{getuid()}")
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if os.name != "nt" and (status.st_uid != getuid() or stat.S_IMODE(status.st_mode) != 0o700):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


class _TemporaryLocator(caching.UserWideCacheLocator):  # type: ignore[misc]
    """The last resort where neither the package's folder nor a cache folder of the user can be written."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        super().__init__(function, file)
        self._cache_path = os.path.join(_temporary_folder(), self.get_suitable_cache_subpath(file))

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Any:
        try:
            locator = super().from_function(function, file)
        except OSError:
            return None
        if locator is not None:
            _warn_once(
                f"no cache folder of Numba's can be written: kernels are kept in {_temporary_folder()}"
            )
        return locator


class _KernelFiles(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (*caching.CacheImpl._locator_classes, _TemporaryLocator)


class _Precompiled:
    """What `PRECOMPILED` has of one function."""

    def __init__(self, function: Callable[..., Any], targets: Callable[[], Iterable[Target]]) -> None:
        self._py_func = function
        self._targets = targets
        # as Numba names the files of a cache
        module = Path(function.__code__.co_filename).stem
        name = re.sub("[<>]", "", f"{module}.{function.__qualname__}")
        python = "{}{}".format(*sys.version_info)
        base = f"{name}-{function.__code__.co_firstlineno}.py{python}{getattr(sys, 'abiflags', '')}"
        self._file = caching.IndexDataCacheFile(str(PRECOMPILED), base, _STAMP)

    def load(self, signature: Any, context: Any) -> Any:
        """The compiled function, or None."""
        context.refresh()  # as Numba's caches do: code that is loaded before crashes
        _, _, hashes = caching.Cache._index_key(self, signature, context.codegen())
        try:
            for target in self._targets():
                data = self._file.load((signature, target, hashes))
                if data is not None:
                    return compiler.CompileResult._rebuild(context, *data)
        except Exception as error:  # files of another user, or damaged ones
            _warn_once(
                f"{PRECOMPILED} cannot be read ({error!r}): kernels are compiled", "install rbe-gpu anew"
            )
        return None


class _KernelCache(caching.FunctionCache):  # type: ignore[misc]
    """The disk cache of one function, and behind it what `PRECOMPILED` has.

    What cannot be read or written is compiled, and said once.

    Numba numbers the files of a function's compiled forms 1, 2, ... Two processes that fill the cache at once take
    the same number for different forms, and a third that loads one then calls the other. Here every file has a name
    of its own.
    """

    _impl_class = _KernelFiles

    def __init__(self, function: Callable[..., Any], precompiled: _Precompiled) -> None:
        super().__init__(function)
        self._precompiled = precompiled
        file = self._cache_file
        file._data_name = lambda number: f"{file._index_name}.{uuid.uuid4().hex[:16]}.nbc"

    def load_overload(self, signature: Any, context: Any) -> Any:
        loaded = self._load_own(signature, context)
        return self._precompiled.load(signature, context) if loaded is None else loaded

    def _load_own(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except OSError as error:  # files of another user
            _warn_once(f"the kernels kept in {self.cache_path} cannot be read ({error}): they are compiled")
        except Exception as error:  # whatever `pickle` makes of a damaged file
            _warn_once(
                f"the kernels kept in {self.cache_path} are damaged ({error!r}): they are compiled anew"
            )
            with suppress(OSError):
                self.flush()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            super().save_overload(signature, compiled)
        except OSError as error:  # a full disk, files of another user
            _warn_once(f"kernels cannot be kept in {self.cache_path} ({error}): every process compiles them")


class _NoFolder(caching.NullCache):  # type: ignore[misc]
    """The cache where no folder can be written: what `PRECOMPILED` has."""

    def __init__(self, precompiled: _Precompiled) -> None:
        self._precompiled = precompiled

    def load_overload(self, signature: Any, context: Any) -> Any:
        return self._precompiled.load(signature, context)


def _cache_of(function: Callable[..., Any], precompiled_targets: Callable[[], Iterable[Target]]) -> Any:
    """The disk cache of a function, of as much as there is."""
    precompiled = _Precompiled(function, precompiled_targets)
    try:
        return _KernelCache(function, precompiled)
    except RuntimeError as error:
        _warn_once(f"kernels are kept nowhere, every process compiles them ({error})")
        return _NoFolder(precompiled)


@contextmanager
def kept_as(
    function: Callable[..., Any], name: str, precompiled_targets: Callable[[], Iterable[Target]]
) -> Iterator[None]:
    """Within the block, functions decorated for the disk cache have a `_KernelCache`; this one under `name`.

    Numba names a function's files after its `__qualname__`, when it is decorated.

    precompiled_targets : () -> the targets whose code of `PRECOMPILED` runs in this process
    """
    plain_name = function.__qualname__
    with compiler_lock:
        modules = (dispatcher_module, ccallback)
        before = [module.FunctionCache for module in modules]
        function.__qualname__ = name
        for module in modules:
            module.FunctionCache = partial(_cache_of, precompiled_targets=precompiled_targets)
        try:
            yield
        finally:
            function.__qualname__ = plain_name
            for module, plain_cache in zip(modules, before, strict=True):
                module.FunctionCache = plain_cache


def merge_precompiled(folder: Path) -> int:
    """Copy the kernels of a folder of the disk cache, NUMBA_CACHE_DIR of a process that has ended, to `PRECOMPILED`.

    Returns
    -------
    Kernels copied; those that `PRECOMPILED` already has for the same target stay
    """
    copied = 0
    PRECOMPILED.mkdir(exist_ok=True)
    for index in sorted(folder.rglob("*.nbi")):
        with index.open("rb") as file:
            version = pickle.load(file)
            _, compiled = pickle.load(file)
        if version != numba.__version__:
            continue
        merged = caching.IndexDataCacheFile(str(PRECOMPILED), index.stem, _STAMP)
        known = merged._load_index()
        for key, data_name in compiled.items():
            if key not in known:
                merged.save(key, pickle.loads((index.parent / data_name).read_bytes()))
                copied += 1
    return copied


def cache_folder(kernel: Any) -> str | None:
    """The folder that a compiled kernel is kept in; None where there is none."""
    path = kernel._cache.cache_path
    return None if path is None else str(path)


# --- the threading layer --------------------------------------------------------------------------------

#: Numba's number of threads in this process.
NUM_THREADS: int = layers.NUM_THREADS


def threads_started() -> bool:
    """Whether Numba's threads have been started in this process, or in the one it was forked from."""
    return bool(layers._is_initialized)


def start_threads() -> None:
    """Start Numba's threading layer, so that `num_threads` can be asked."""
    layers._launch_threads()


def num_threads() -> int:
    """`numba.get_num_threads()`, without the locks that it takes."""
    return int(layers._get_num_threads())


def renew_locks() -> None:
    """In a forked child: another thread of the parent may have held Numba's locks."""
    layers._backend_init_thread_lock = threading.RLock()
    layers._backend_init_process_lock = None  # made anew where it is needed


# --- calling a compiled function by its address ---------------------------------------------------------


@intrinsic
def share_function(typingctx, kernel, count, grain, parts, args):
    """share_function(kernel, count, grain, parts, (a, b, ...)) -> (address, params).

    The C function at `address`, called with (part, params, 0), calls kernel(a, b, ..., start, stop) for the part's
    share of 0 .. count, whose start is a multiple of `grain`. The arguments are on the stack of the calling function.
    `kernel` must not raise.
    """
    if not isinstance(kernel, types.Dispatcher) or not isinstance(args, types.BaseTuple):
        return None
    kernel_signature = kernel.get_call_type(typingctx, (*args.types, types.int64, types.int64), {})

    def codegen(context, builder, signature, values):
        compiled = kernel.dispatcher.get_compile_result(kernel_signature)
        context.add_linking_libs([compiled.library])
        memory = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, values[1:]))
        name = builder.module.get_unique_name("rbe_gpu.share")
        kind = ir.FunctionType(ir.VoidType(), [_I64, memory.type, _I64])
        function = ir.Function(builder.module, kind, name)
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        part = function.args[0]
        count_, grain_, parts_, args_ = cgutils.unpack_tuple(inner, inner.load(function.args[1]), 4)
        grains = inner.sdiv(inner.sub(inner.add(count_, grain_), _I64(1)), grain_)
        start, end = (
            inner.mul(inner.sdiv(inner.mul(grains, p), parts_), grain_)
            for p in (part, inner.add(part, _I64(1)))
        )
        stop = inner.select(inner.icmp_signed("<", end, count_), end, count_)
        context.call_internal_no_propagate(
            inner, compiled.fndesc, kernel_signature,
            [*cgutils.unpack_tuple(inner, args_, len(args.types)), start, stop],
        )  # fmt: skip
        inner.ret_void()
        pair = [builder.ptrtoint(function, _I64), builder.ptrtoint(memory, _I64)]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(types.int64, 2)(kernel, types.int64, types.int64, types.int64, args), codegen
