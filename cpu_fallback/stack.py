"""Small arrays in the frame of a kernel, for scratch memory that every part of a job needs: nothing is allocated."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ._numba_internals import cgutils, populate_array


@intrinsic(prefer_literal=True)
def stack_array(typingctx, count, dtype):
    """stack_array(count, np.float32) -> uninitialised array of a constant number of elements, some kilobytes at most.

    It lives until the kernel returns.
    """
    if not isinstance(count, types.IntegerLiteral) or not isinstance(dtype, types.NumberClass):
        return None
    array, elements = types.Array(dtype.instance_type, 1, "C"), count.literal_value

    def codegen(context, builder, signature, args):
        made = context.make_array(array)(context, builder)
        element = context.get_data_type(array.dtype)
        size = ir.Constant(ir.IntType(64), context.get_abi_sizeof(element))
        memory = cgutils.alloca_once(builder, ir.ArrayType(element, elements))
        memory.align = 64
        data = builder.bitcast(memory, made.data.type)
        shape = [ir.Constant(ir.IntType(64), elements)]
        populate_array(made, data=data, shape=shape, strides=[size], itemsize=size, meminfo=None)
        return made._getvalue()

    return array(count, dtype), codegen
