"""Kernel parameters with names: a struct, defined once for the code that fills it and for the kernel that reads it.

    SOFTMAX = Struct("SoftmaxParams", x="const void*", rows="i64")

- A CPU kernel gets the address of `SOFTMAX.record(x=..., rows=...)`, an array of one record, and reads the fields by
  name: a Numba record, not a copy.
- A CUDA kernel gets the fields of `SOFTMAX.fill(x=..., rows=...)` one by one, by a macro of the text that
  `SOFTMAX.text()` renders, and puts them back into the struct at its first line. The struct by value, as the one
  parameter, costs registers (NVRTC 13.5, sm_90: attention_f16_128 and attention_bf16_128 spill 52 bytes, three
  kernels of linear 16). So Python and CUDA share no layout that a `static_assert` could check. They share names,
  order and types: `tests/test_launch_params.py` compiles every struct from its parameters.
- A `CONSTANT` is a setting that a CUDA kernel is compiled for: the width of codes, a block size, a dtype.
  `Params.constants` has the values of a launch. `text(constants)` renders the field as
  `static constexpr int bits = 4;` and leaves it out of the parameters, so that a kernel reads `c.bits` either way;
  without `constants` it is a parameter like the others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

#: The type of a field that a kernel is compiled for.
CONSTANT = "constexpr int"
_NO_CONSTANTS: Mapping[str, int] = MappingProxyType({})

#: By the names that the CUDA kernels use.
_INTEGERS: dict[str, Callable[[int], Any]] = {
    "int": np.int32,
    CONSTANT: np.int32,
    "u32": np.uint32,
    "i64": np.int64,
    "u64": np.uint64,
}
#: Codes of the module `struct` for the fields of a record; an address is an int64.
_CODES = {"int": "i", CONSTANT: "i", "u32": "I", "i64": "q", "u64": "Q", "float": "f"}
_NULL = np.uint64(0)  # CuPy would take None for no parameter at all


def address(array: Any) -> int:
    """Address of the first element of a CuPy or NumPy array."""
    if isinstance(array, np.ndarray):
        return int(array.__array_interface__["data"][0])
    return int(array.data.ptr)


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """A filled struct: `params["rows"]`, `params["codes.cols"]` of a nested struct; an array of a pointer, or None.

    Attributes
    ----------
    struct : its definition
    values : arrays, None and NumPy scalars in the order of `struct.leaves`
    """

    struct: Struct
    values: tuple[Any, ...]

    def __getitem__(self, leaf: str) -> Any:
        return self.values[self.struct.leaves[leaf]]

    @property
    def constants(self) -> tuple[int, ...]:
        """The values that the kernel is compiled for, in the order of `struct.constants`."""
        return tuple([int(self.values[i]) for i in self.struct.constants.values()])

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What a kernel compiled for `constants` is called with: arrays, null pointers and NumPy scalars."""
        return tuple([_NULL if self.values[i] is None else self.values[i] for i in self.struct.passed])


class Struct:
    """A C struct of kernel parameters.

    Parameters
    ----------
    name : of the C struct
    fields : a C type each ("int", "u32", "i64", "u64", "float", or a pointer "const void*"), `CONSTANT`, or a Struct

    Attributes
    ----------
    dtype : of a record, aligned as a C compiler aligns the struct
    leaves : places of the fields that are no structs, "codes.cols" for those of a nested struct
    types : their C types
    constants : places among the leaves of the fields that a kernel is compiled for, by "Codes.bits": the struct that
        has the field, and the field
    passed : places of the other leaves

    Raises
    ------
    TypeError
        Two nested structs of one type have constants, which would be the same C constants.
    """

    dtype: np.dtype[np.void]
    leaves: dict[str, int]
    constants: dict[str, int]
    passed: tuple[int, ...]
    types: tuple[str, ...]
    _format: str

    def __init__(self, name: str, /, **fields: str | Struct) -> None:
        self.name = name
        self.fields = fields
        leaves: list[str] = []
        types: list[str] = []
        self.constants = {}
        for field, kind in fields.items():
            if isinstance(kind, Struct):
                if repeated := self.constants.keys() & kind.constants.keys():
                    raise TypeError(f"{name}: {sorted(repeated)} stand in two of its structs")
                self.constants |= {key: len(leaves) + place for key, place in kind.constants.items()}
                leaves += [f"{field}.{leaf}" for leaf in kind.leaves]
                types += kind.types
            else:
                if kind == CONSTANT:
                    self.constants[f"{name}.{field}"] = len(leaves)
                leaves.append(field)
                types.append("int" if kind == CONSTANT else kind)
        self.passed = tuple(sorted(set(range(len(leaves))) - set(self.constants.values())))
        self.leaves = {leaf: i for i, leaf in enumerate(leaves)}
        self.types = tuple(types)
        codes = {f: k if isinstance(k, Struct) else _CODES.get(k, "q") for f, k in fields.items()}
        kinds = {f: c.dtype if isinstance(c, Struct) else c for f, c in codes.items()}
        self.dtype = np.dtype(list(kinds.items()), align=True)
        # aligned as C does: the struct itself, and its end, as its widest field
        edge = f"0{'q' if self.dtype.alignment == 8 else 'i'}"
        inner = "".join(c._format if isinstance(c, Struct) else c for c in codes.values())
        self._format = edge + inner + edge
        self._pack = struct.Struct(self._format).pack
        self._zeros = {f: (0,) * len(k.leaves) if isinstance(k, Struct) else 0 for f, k in fields.items()}

    def record(self, **values: Any) -> np.ndarray[Any, np.dtype[np.void]]:
        """An array of one record with these fields: numbers, addresses for pointers, tuples of leaves for structs.

        Fields that are not named are zero. Raises `TypeError` for a field that the struct does not have.
        """
        if unknown := values.keys() - self.fields.keys():
            raise TypeError(f"{self.name}: unknown fields {sorted(unknown)}")
        row: list[Any] = []
        for field, zero in self._zeros.items():
            value = values.get(field, zero)
            if isinstance(value, tuple):
                row += value
            else:
                row.append(value)
        # assigning to a record of NumPy's takes five times as long
        return np.frombuffer(bytearray(self._pack(*row)), self.dtype)

    def offset(self, field: str) -> int:
        """Bytes in front of a field of a record."""
        return int(self.dtype.fields[field][1])  # type: ignore[index]

    def fill(self, **values: Any) -> Params:
        """The struct with every field set: arrays or None for pointers, numbers, Params for nested structs.

        Raises
        ------
        TypeError
            A field is missing or unknown, or a value is of another kind than the field.
        OverflowError
            An integer does not fit its field.
        """
        if values.keys() != self.fields.keys():
            missing, unknown = self.fields.keys() - values.keys(), values.keys() - self.fields.keys()
            raise TypeError(
                f"{self.name}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}"
            )
        row: list[Any] = []
        for field, kind in self.fields.items():
            value = values[field]
            if isinstance(kind, Struct):
                if not isinstance(value, Params) or value.struct is not kind:
                    raise self._wrong(field, value)
                row += value.values
            elif kind.endswith("*"):
                if value is not None and not hasattr(value, "dtype"):
                    raise self._wrong(field, value)
                row.append(value)
            elif kind == "float":
                row.append(np.float32(value))
            elif isinstance(value, int | np.integer | np.bool_):
                row.append(_INTEGERS[kind](int(value)))
            else:
                raise self._wrong(field, value)
        return Params(self, tuple(row))

    def _wrong(self, field: str, value: Any) -> TypeError:
        kind = self.fields[field]
        expected = kind.name if isinstance(kind, Struct) else kind
        got = value.struct.name if isinstance(value, Params) else type(value).__name__
        return TypeError(f"{self.name}: the field {field} is {expected}, got {got}")

    def text(self, constants: Mapping[str, int] = _NO_CONSTANTS) -> str:
        """The C struct; `<name>_PARAMETERS`, the parameters of a kernel; `<name>_VALUES`, the struct from them.

        constants : values by "Codes.bits", as the keys of `self.constants`
        """
        fields = ""
        for field, kind in self.fields.items():
            value = constants.get(f"{self.name}.{field}")
            if value is not None:
                fields += f"  static {CONSTANT} {field} = {value};\n"
            else:
                fields += f"  {_c_type(kind)} {field};\n"
        known = {place for key, place in self.constants.items() if key in constants}
        parameters = ", ".join(
            f"{kind} p_{leaf.replace('.', '_')}"
            for (leaf, place), kind in zip(self.leaves.items(), self.types, strict=True)
            if place not in known
        )
        return (
            f"struct {self.name} {{\n{fields}}};\n#define {self.name}_PARAMETERS {parameters}\n"
            f"#define {self.name}_VALUES {self._initialiser('p', constants)}\n"
        )

    def _initialiser(self, prefix: str, constants: Mapping[str, int]) -> str:
        values = [
            kind._initialiser(f"{prefix}_{field}", constants)
            if isinstance(kind, Struct)
            else f"{prefix}_{field}"
            for field, kind in self.fields.items()
            if f"{self.name}.{field}" not in constants
        ]
        return "{" + ", ".join(values) + "}"


def _c_type(kind: str | Struct) -> str:
    if isinstance(kind, Struct):
        return kind.name
    return "int" if kind == CONSTANT else kind
