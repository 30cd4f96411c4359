"""The interface of a codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..dispatch import device_of
from ..json_checks import Fail

Array = Any  # numpy.ndarray or cupy.ndarray
F32 = NDArray[np.float32]
C = TypeVar("C", bound="Codes")

GROUPS = (32, 64, 128)  # coefficients that share a scale
DEFAULT_GROUP = 64


class Take(Protocol):
    """Reads one array of a stored tensor and checks it; what does not fit is a `FormatError`.

    dtypes : the safetensors dtypes allowed
    shape : the shape expected; None: one axis of any length
    finite : refuse NaN and Inf
    """

    def __call__(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None, finite: bool = False
    ) -> NDArray[Any]: ...


class LoadCost(NamedTuple):
    """Bytes that loading codes takes beyond the mapped file, at most.

    resident : as long as the codes live
    working : only while they are made
    decompressed : values that come out of an entropy coder, and so may be many more than the file has bytes
    """

    resident: int
    working: int
    decompressed: int


class Codes(ABC):
    """A coefficient matrix (rows_pad, cols_pad) as one codec stores it. A codec is a frozen dataclass of this type.

    Attributes
    ----------
    kind : the codec's name in a file
    array_names : the arrays that a file may hold, in the order in which they are checked
    value : the array that holds the values; its device is the device of the weight
    """

    kind: ClassVar[str]
    array_names: ClassVar[tuple[str, ...]]
    value: Array

    @property
    @abstractmethod
    def name(self) -> str:
        """The codec and its width, as in `compress(codes=...)`: "dense-int4"."""

    @property
    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """The arrays that a file holds, by name."""

    @abstractmethod
    def has_size(self, rows: int, cols: int) -> bool:
        """Whether they are the codes of a (rows, cols) coefficient matrix, as far as the shapes of arrays tell."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """The JSON object that describes these codes in a file; its "kind" is `kind`."""

    @classmethod
    @abstractmethod
    def from_file(cls: type[C], stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> C:
        """The codes of a (rows, cols) coefficient matrix from their description and arrays.

        Both are untrusted input: every count and index that becomes an address is checked here, and copied before
        that (`np.array(take(...))`), because a mapped file may change later.

        Raises
        ------
        FormatError
            Through `fail` or `take`: anything that `FORMAT.md` does not allow.
        """

    @classmethod
    def upgrade(cls, stored: dict[str, Any], version: int, fail: Fail) -> dict[str, Any]:
        """The description, not checked yet, of an older version of the format as the present one has it.

        Override it where the description has changed.
        """
        return stored

    @classmethod
    def check_file(cls, stored: Any, rows: int, cols: int, take: Take, fail: Fail) -> None:
        """The checks of `from_file`, keeping nothing. Called first where `load_cost` is far more than the file.

        Override it where `from_file` takes much memory before all is checked.
        """
        cls.from_file(stored, rows, cols, take, fail)

    @classmethod
    def load_cost(cls, stored: Any, rows: int, cols: int) -> LoadCost:
        """Memory for `from_file` beyond the mapped arrays; `stored` has not been checked. By default none."""
        return LoadCost(0, 0, 0)

    @classmethod
    @abstractmethod
    def header_bound(cls, rows: int, cols: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """A description and array shapes whose JSON is no shorter than that of any codes of this size."""

    @classmethod
    def candidates(cls) -> Iterator[EncodeConfig]:
        """The configurations that `compress` tries, of each group size the narrowest first; none by default."""
        return iter(())

    @property
    def device(self) -> str:
        return device_of(self.value)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return total_nbytes(self.arrays)

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory."""
        return self.nbytes

    def map_arrays(self: C, function: Callable[[Array], Array]) -> C:
        """The same codes with `function` applied to each array that kernels read: a copy to a GPU, for instance."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        mapped = {name: function(a) for name, a in arrays.items() if hasattr(a, "nbytes")}
        return replace(self, **mapped)  # type: ignore[type-var]

    def for_gpu(self) -> Codes:
        """The same codes in the form that CUDA kernels read, on the host."""
        return self

    def for_lookup(self) -> Codes:
        """The same codes in the form that takes least memory where rows are looked up, and nothing is multiplied."""
        return self

    def for_int8(self) -> Codes:
        """The same codes in the form that takes least memory where they are multiplied with int8 activations."""
        return self

    #: Whether `for_int8` made them in another form than `for_float` has.
    is_for_int8: ClassVar[bool] = False

    def for_float(self) -> Codes:
        """The same codes in the form that is multiplied with activations as they are."""
        return self

    def check_read_back(self, read: Codes, fail: Fail) -> None:
        """Called by the writer with what `from_file` makes of these codes; `fail` where the two differ."""
        return


@dataclass(frozen=True)
class EncodeConfig(ABC):
    """A codec with its parameters: how to encode a coefficient matrix.

    Attributes
    ----------
    bits : of one value
    group : values that share a scale; 0: no scales
    density : fraction of the coefficients that is stored
    prunes : whether the codec can store a density below 1
    """

    bits: int
    group: int = 0
    density: float = 1.0
    prunes: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As `Codes.name`."""

    @abstractmethod
    def quantize(self, c: F32) -> Codes:
        """Encode the coefficients c (rows, cols)."""

    @abstractmethod
    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes stored for a (rows, cols) coefficient matrix."""

    @abstractmethod
    def squared_error(self, sample: Sample) -> float:
        """The squared error of encoding the coefficients of a sample."""


class Sample:
    """Some rows of a coefficient matrix, and the error that a configuration would make on them.

    Parameters
    ----------
    c : (rows, cols) float32 coefficients
    energy : sum of squares of the same rows of the weight (divided by its gain, before basis and transform)
    weight : what a squared error of a coefficient adds to the weight's, 1 for orthonormal transforms

    Attributes
    ----------
    coefficients : c
    magnitudes : |c|, flat
    sorted : the magnitudes in ascending order
    pruned : (size + 1,) float64, squared error of dropping the n smallest coefficients
    """

    def __init__(self, c: F32, energy: float, weight: float) -> None:
        self.coefficients = c
        self._energy = energy
        self._weight = weight
        self.magnitudes = np.abs(c.reshape(-1))
        self.sorted = np.sort(self.magnitudes)
        self.pruned = np.concatenate([[0.0], np.cumsum(self.sorted.astype(np.float64) ** 2)])

    def relative_error(self, config: EncodeConfig) -> float:
        """Estimated relative Frobenius error of the weight."""
        squared = config.squared_error(self)
        return float(np.sqrt(squared * self._weight / self._energy)) if self._energy else 0.0

    def least_density(self, target: float) -> float:
        """The density at which pruning alone meets a relative error."""
        allowed = target * target * self._energy / self._weight
        dropped = int(np.searchsorted(self.pruned, allowed, side="right")) - 1
        return 1.0 - dropped / self.sorted.size


def total_nbytes(arrays: dict[str, Array]) -> int:
    return int(sum(a.nbytes for a in arrays.values()))


def on_host(a: Array) -> NDArray[Any]:
    """The array in host memory; a CuPy array is copied from its GPU."""
    return np.asarray(a if device_of(a) == "cpu" else a.get())
