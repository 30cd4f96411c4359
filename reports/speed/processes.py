"""The processes that compute the cases of speed: NumPy, PyTorch, ONNX Runtime and rbe_gpu, each in its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import rbe_gpu as rbe
from rbe_gpu.models.load import load_encoder

from ..harness.baselines import F32, torch_or_none
from ..harness.inputs import Inputs
from ..harness.libraries import Library, RemoteCalls, RemoteClock, Server, remote
from ..harness.measure import (
    NUMPY,
    ONNX,
    OURS,
    TORCH,
    Case,
    Provider,
    builds,
    check_case,
    library_of,
    measure,
    to_numpy,
)
from ..harness.rows import Row, Session
from ..harness.timing import paired_times
from . import costs
from .cases import load
from .cases import model as models

#: packages that a library needs, by its name
PACKAGES = {NUMPY: (), TORCH: ("torch",), ONNX: ("onnx", "onnxruntime"), OURS: ()}


def installed() -> list[str]:
    """The libraries that can be measured here."""
    return [
        name for name, needs in PACKAGES.items() if all(find_spec(package) is not None for package in needs)
    ]


# --- in the process of a library --------------------------------------------------------------------------


class SpeedServer(Server):
    """The cases and encoders of the library that this process builds."""

    def __init__(self, folder: str, threads: int, quick: bool, wide: str | None) -> None:
        super().__init__()
        torch = torch_or_none()
        if torch is not None:
            torch.set_num_threads(threads)
        self._inputs = Inputs(Path(folder), wide=None if wide is None else Path(wide))
        self._threads, self._quick = threads, quick
        self._cases: dict[str, Iterator[Case]] = {}
        self._case: Case | None = None
        self._encoders: dict[str, Any] = {}

    def case(self, op: str) -> Case | None:
        """Build the next case of an op. Returns it with providers of as many calls, or None after the last."""
        cases = self._cases.setdefault(op, load(op)(self._inputs, self._quick))
        built = next(cases, None)
        if built is None:
            self._case, self.providers = None, {}
            return None
        own = {name: p for name, p in built.providers.items() if builds(library_of(name))}
        self._case, self.providers = replace(built, providers=own), own
        calls = {name: Provider(range(len(p.calls))) for name, p in own.items()}  # type: ignore[arg-type]
        return replace(built, providers=calls, sample=None)

    def check(self, session: Session) -> list[Row]:
        """`check_case` of the last case, and what a call costs beside its time."""
        assert self._case is not None
        return [*check_case(self._case, session), *costs.rows(self._case, session)]

    def baseline_encoders(self) -> list[str]:
        """Load the library's dense encoder, if it is a baseline. Returns the names of the providers."""
        loaded = models.baselines(self._inputs, self._threads)
        self._encoders |= loaded
        return list(loaded)

    def load_encoder(self, provider: str, file: str, cache_bytes: int | None) -> None:
        """Load a model of ours, in the place of an earlier one of that name."""
        options: dict[str, Any] = {} if cache_bytes is None else {"cache_bytes": cache_bytes}
        self._encoders[provider] = load_encoder(Path(file), **options)

    def load_on_gpu(self, provider: str, file: str) -> str:
        """Load a model of ours on CUDA's first GPU, whose PCI bus id is returned."""
        import cupy

        self._encoders[provider] = rbe.to(load_encoder(Path(file)), "cuda:0")
        return str(cupy.cuda.runtime.deviceGetPCIBusId(0))

    def embed(self, provider: str, texts: list[str]) -> F32:
        vectors: F32 = to_numpy(self._encoders[provider].embed(texts))
        return vectors

    def embed_for(self, provider: str, texts: list[str], seconds: float) -> int:
        """Embed the texts over and over for so long. Returns how often."""
        encoder, end, count = self._encoders[provider], time.monotonic() + seconds, 0
        while time.monotonic() < end:
            to_numpy(encoder.embed(texts))  # on a GPU: waits for it
            count += 1
        return count

    def take(self, texts: list[str]) -> None:
        """From now on the calls of every encoder embed these texts."""
        self.providers = {name: Provider([partial(m.embed, texts)]) for name, m in self._encoders.items()}

    def held_bytes(self, provider: str) -> float | None:
        """Bytes of weights and decoded panels of a model of ours."""
        encoder = self._encoders[provider]
        return float(encoder.nbytes + encoder.cache.nbytes) if hasattr(encoder, "cache") else None

    def forget(self) -> None:
        """Drop all encoders."""
        self._encoders.clear()
        self.providers = {}


def serve(folder: str, threads: int, quick: bool, wide: str | None) -> SpeedServer:
    """What a process of `Processes` serves."""
    return SpeedServer(folder, threads, quick, wide)


# --- in the process that measures -------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteEncoder:
    """An encoder in the process of its library."""

    library: Library
    provider: str

    def embed(self, texts: list[str]) -> F32:
        vectors: F32 = self.library.request("embed", self.provider, texts)
        return vectors

    def calls(self, texts: list[str]) -> RemoteCalls:
        """The call that embeds these texts; so do those of all encoders of this library from now on."""
        self.library.request("take", texts)
        return RemoteCalls(self.library, self.provider, 1)

    def held_bytes(self) -> float | None:
        held: float | None = self.library.request("held_bytes", self.provider)
        return held


class Processes:
    """The processes of all libraries that are installed; ends them when the block ends."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        quick: bool,
        names: Iterable[str] | None = None,
        wide: Path | None = None,
    ) -> None:
        self._open = ExitStack()
        self.libraries: dict[str, Library] = {}
        options = {"folder": str(folder), "threads": threads, "quick": quick, "wide": wide and str(wide)}
        try:
            for name in installed() if names is None else names:
                library = Library(name, f"{__name__}:serve", **options)
                self._open.callback(library.close)
                self.libraries[name] = library
            for library in self.libraries.values():  # they import and read the model at the same time
                library.wait()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def pids(self) -> list[int]:
        return [library.pid for library in self.libraries.values()]

    def cases(self, op: str) -> Iterator[Case]:
        """The cases of an op, their providers in the processes."""
        while True:
            for library in self.libraries.values():  # they build at the same time
                library.send("case", op)
            parts = [library.receive() for library in self.libraries.values()]
            built = [part for part in parts if part is not None]
            if not built:
                return
            names = {None if part is None else (part.name, part.shape) for part in parts}
            if len(names) > 1:
                raise RuntimeError(f"the processes build different cases of {op}: {names}")
            counts = {name: len(p.calls) for part in built for name, p in part.providers.items()}
            calls = remote(self.libraries, counts)
            yield replace(built[0], providers={name: Provider(calls[name]) for name in counts})

    def measure(self, case: Case, session: Session, seconds: float, least: int) -> list[Row]:
        """Check and time every provider of a case that `cases` gave last.

        Raises
        ------
        WrongResult
            A result differs from the expected one by more than it may.
        """
        timer = partial(paired_times, seconds=seconds, least=least, clock=RemoteClock())
        return measure(case, session, timer, self._check)[0]

    def _check(self, case: Case, session: Session) -> list[Row]:
        return [row for library in self.libraries.values() for row in library.request("check", session)]

    def baseline_encoders(self) -> dict[str, RemoteEncoder]:
        """The baselines' dense encoders by provider."""
        return {
            name: RemoteEncoder(library, name)
            for library in self.libraries.values()
            for name in library.request("baseline_encoders")
        }

    def load_encoder(self, provider: str, file: Path, cache_bytes: int | None = None) -> RemoteEncoder:
        """A model of ours, of a folder or a file."""
        library = self.libraries[OURS]
        library.request("load_encoder", provider, str(file), cache_bytes)
        return RemoteEncoder(library, provider)

    def load_on_gpu(self, provider: str, file: Path) -> tuple[RemoteEncoder, str]:
        """A model of ours on CUDA's first GPU, and the PCI bus id of that."""
        library = self.libraries[OURS]
        bus = library.request("load_on_gpu", provider, str(file))
        return RemoteEncoder(library, provider), bus

    def forget_encoders(self) -> None:
        """Free the memory of all encoders."""
        for library in self.libraries.values():
            library.request("forget")
