"""Atomic operations on int64 words of memory, and sleeping until one changes, for kernels and for the thread pool.

A word is an element `array[index]`; no bounds are checked. All operations are sequentially consistent.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_internals import cgutils, populate_array

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_VOID, _POINTER = ir.VoidType(), ir.IntType(8).as_pointer()
#: The instruction of a waiting loop, by the name of the architecture.
_HINTS = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [_I32(1)]),
    "arm64": ("llvm.aarch64.hint", [_I32(1)]),
}
#: Number of Linux's system call `futex`, by the name of the architecture.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # between threads of one process
_ULOCK_COMPARE_AND_WAIT, _ULOCK_WAKE_ALL = 1, 0x101
#: Whether threads can sleep on a word here. Tested on Linux only.
CAN_SLEEP = sys.platform in ("darwin", "win32") or (sys.platform == "linux" and _FUTEX is not None)

if sys.platform == "win32":
    _synch = ctypes.WinDLL("api-ms-win-core-synch-l1-2-0")
    for _name in ("WaitOnAddress", "WakeByAddressAll"):
        llvm.add_symbol(_name, ctypes.cast(getattr(_synch, _name), ctypes.c_void_p).value)


def _is_words(array: types.Type) -> bool:
    return isinstance(array, types.Array) and array.dtype == types.int64


def _word(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


def pause(builder: ir.IRBuilder) -> None:
    """Emit the instruction that tells the processor that a loop waits."""
    hint = _HINTS.get(builder.module.triple.partition("-")[0])
    if hint is not None:
        name, operands = hint
        kind = ir.FunctionType(_VOID, [o.type for o in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@intrinsic
def atomic_load(typingctx, array, index):
    """atomic_load(array, index) -> array[index]."""
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_word(context, builder, signature, args), "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def atomic_store(typingctx, array, index, value):
    """atomic_store(array, index, value): array[index] = value."""
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], _word(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx, array, index, value):
    """atomic_add(array, index, value) -> array[index], which grows by `value` in the same step."""
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _word(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_replace(typingctx, array, index, old, new):
    """atomic_replace(array, index, old, new) -> whether array[index] was `old` and is `new` now."""
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        pair = builder.cmpxchg(
            _word(context, builder, signature, args), args[2], args[3], "seq_cst", "seq_cst"
        )
        return builder.extract_value(pair, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), codegen


@intrinsic
def pause_once(typingctx):
    """One turn of a loop that waits: some ten to a hundred cycles."""

    def codegen(context, builder, signature, args):
        pause(builder)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typingctx):
    """Let another thread that is ready run on this core."""

    def codegen(context, builder, signature, args):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        kind = ir.FunctionType(_I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _call(
    builder: ir.IRBuilder, name: str, kinds: list[ir.Type], args: list[ir.Value], variadic: bool
) -> None:
    kind = ir.FunctionType(_I64, kinds, var_arg=variadic)
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _sleep_while(builder: ir.IRBuilder, word: ir.Value, value: ir.Value) -> None:
    """Emit the system's call that sleeps while the lower 32 bits of a word are those of `value`."""
    if sys.platform == "win32":
        expected = cgutils.alloca_once(builder, _I64)
        builder.store(value, expected)
        pointers = [builder.bitcast(p, _POINTER) for p in (word, expected)]
        kinds = [_POINTER, _POINTER, _I64, _I32]
        _call(builder, "WaitOnAddress", kinds, [*pointers, _I64(4), _I32(-1)], False)
        return
    address, low = builder.ptrtoint(word, _I64), builder.and_(value, _I64(0xFFFFFFFF))
    if sys.platform == "darwin":
        args = [_I32(_ULOCK_COMPARE_AND_WAIT), address, low, _I32(0)]
        _call(builder, "__ulock_wait", [_I32, _I64, _I64, _I32], args, False)
    else:
        zero = _I64(0)
        args = [_I64(_FUTEX), address, _I64(_FUTEX_WAIT), low, zero, zero, zero]
        _call(builder, "syscall", [_I64], args, True)


def _wake(builder: ir.IRBuilder, word: ir.Value, count: ir.Value) -> None:
    """Emit the system's call that wakes `count` threads, or all, that sleep on a word."""
    address = builder.ptrtoint(word, _I64)
    if sys.platform == "win32":
        _call(builder, "WakeByAddressAll", [_I64], [address], False)
    elif sys.platform == "darwin":
        _call(builder, "__ulock_wake", [_I32, _I64, _I64], [_I32(_ULOCK_WAKE_ALL), address, _I64(0)], False)
    else:
        zero = _I64(0)
        args = [_I64(_FUTEX), address, _I64(_FUTEX_WAKE), count, zero, zero, zero]
        _call(builder, "syscall", [_I64], args, True)


@intrinsic
def sleep_while(typingctx, array, index, value):
    """sleep_while(array, index, value): until `wake` is called, or at once if array[index] is not `value`.

    The lower 32 bits are compared. It may return earlier: the caller looks at the word again. Where `CAN_SLEEP`.
    """
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        _sleep_while(builder, _word(context, builder, signature, args), args[2])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def wake(typingctx, array, index, count):
    """wake(array, index, count): at least `count` of the threads that sleep on array[index]. Where `CAN_SLEEP`."""
    if not _is_words(array):
        return None

    def codegen(context, builder, signature, args):
        _wake(builder, _word(context, builder, signature, args), args[2])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def words_at(typingctx, address, count):
    """words_at(address, count) -> the int64 words there as an array."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], _I64.as_pointer())
        array = context.make_array(signature.return_type)(context, builder)
        populate_array(array, place, [args[1]], [_I64(8)], _I64(8), None)
        return array._getvalue()

    return types.Array(types.int64, 1, "C")(types.int64, types.int64), codegen


@intrinsic
def symbol_address(typingctx, name):
    """symbol_address("name") -> the address that `llvm.add_symbol` gave that name, as int64."""
    if not isinstance(name, types.StringLiteral):
        return None

    def codegen(context, builder, signature, args):
        symbol = builder.module.globals.get(name.literal_value)
        if symbol is None:
            symbol = ir.GlobalVariable(builder.module, _I64, name.literal_value)
        return builder.ptrtoint(symbol, _I64)

    return types.int64(name), codegen


@intrinsic
def call_address(typingctx, function, arguments):
    """call_address(function, (a, b, ...)): the C function at that address with int64 arguments; no result."""
    if not isinstance(arguments, types.UniTuple) or arguments.dtype != types.int64:
        return None

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_VOID, [_I64] * arguments.count)
        values = [builder.extract_value(args[1], i) for i in range(arguments.count)]
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def call_symbol(typingctx, name, arguments):
    """call_symbol("name", (a, b, ...)): the C function of that symbol with int64 arguments; no result."""
    if not isinstance(name, types.StringLiteral) or not isinstance(arguments, types.UniTuple):
        return None

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_VOID, [_I64] * arguments.count)
        function = cgutils.get_or_insert_function(builder.module, kind, name.literal_value)
        builder.call(function, [builder.extract_value(args[1], i) for i in range(arguments.count)])
        return context.get_dummy_value()

    return types.void(name, arguments), codegen
