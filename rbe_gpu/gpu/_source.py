"""The text that is compiled: a file of `cuda_src` with every header that it includes, from that folder or rendered
from the structs of `_params`.

`kernel_source(kernel)` is the text of a module on a GPU: one kernel, with the constants of its configuration in the
structs (`static constexpr int bits = 4;`), so that the compiler drops the branches on them. `source(op)` has every
kernel of a source, and takes the same numbers as parameters: the host build, which tests every configuration with one
compilation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

from ._launch import Kernel
from ._params import HEADERS

_NO_CONSTANTS: Mapping[str, int] = MappingProxyType({})
_INCLUDE = re.compile(r'#include "(\w+\.(?:cuh|h))"\n')


def read(name: str, constants: Mapping[str, int] = _NO_CONSTANTS) -> str:
    """The text of a file of `cuda_src`, or of a header of kernel parameters."""
    if name in HEADERS:
        return "\n".join(struct.text(constants) for struct in HEADERS[name])
    return resources.files("rbe_gpu.cuda_src").joinpath(name).read_text(encoding="utf-8")


def has(op: str) -> bool:
    """Whether an op has CUDA kernels."""
    return resources.files("rbe_gpu.cuda_src").joinpath(f"{op}.cu").is_file()


def expand(name: str, text: str, constants: Mapping[str, int] = _NO_CONSTANTS) -> str:
    """`text` with the headers of `cuda_src` in the place of their includes, each once, theirs included.

    One text, since CuPy's disk cache hashes the source but not what it includes. Compiler messages name the files.
    """
    seen: set[str] = set()

    def lines_of(name: str, text: str) -> list[str]:
        result = [f'#line 1 "{name}"\n']
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            include = _INCLUDE.fullmatch(line)
            if include is None:
                result.append(line)
            elif include[1] in seen:
                result.append("\n")
            else:
                seen.add(include[1])
                result += [
                    *lines_of(include[1], read(include[1], constants)),
                    f'#line {number + 1} "{name}"\n',
                ]
        return result

    return "".join(lines_of(name, text))


@lru_cache
def source(op: str) -> str:
    """The expanded text of `cuda_src/<op>.cu`."""
    return expand(f"{op}.cu", read(f"{op}.cu"))


@lru_cache
def kernel_source(kernel: Kernel) -> str:
    """The expanded text of one kernel for its configuration; KERNEL of types.cuh leaves the others out."""
    chosen = f'#define ONE_KERNEL\n#define CHOSEN_{kernel.entry} , extern "C"\n'
    return chosen + expand(f"{kernel.op}.cu", read(f"{kernel.op}.cu"), dict(kernel.constants))
