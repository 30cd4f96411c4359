"""What a calibration measures of a dense model: moments of the inputs of its weights, and how sensitive its results
are to each weight. In this process, or as tasks of workers.

Workers get batches of the inputs for the moments, and weights for the sensitivities. They return the float32 products
of each batch, which this process sums in the order of the batches: the sums have the bits of one process.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import output
from ..cluster import run_tasks, scratch_folder
from ..feedback import Geometry, Moments, Sums, geometry
from ..threads import blas
from .allocation import Weight
from .architectures import is_gguf
from .bert import BertEncoder
from .decoder import Decoder
from .decoder_embedder import DecoderEmbedder
from .decoder_probes import DecoderProbes, DecoderSums, decoder_of
from .encoder_probes import EncoderProbes, EncoderSums
from .journal import NoJournal, digest
from .load import load, load_gguf
from .parts_folder import Files, PartsFolder, files_of
from .scratch import Scratch
from .source import open_source

F32 = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
Model = BertEncoder | Decoder | DecoderEmbedder
#: what a model runs on: texts, or of decoders windows of token ids
Inputs = Sequence[str] | Sequence[Sequence[int]]


class InputSums(Protocol):
    """A dense model on inputs, batch by batch.

    Attributes
    ----------
    count : of batches
    readers : for each layer: stage -> names of the weights that read its input
    """

    count: int
    readers: list[dict[str, list[str]]]

    def of_batch(self, index: int) -> Iterator[dict[str, Sums]]:
        """For each layer: stage -> the sums of its input."""


class Probes(Protocol):
    """A dense model on a few inputs, of which one weight at a time is replaced."""

    def values(self, name: str) -> F32:
        """The weight, (rows, cols)."""

    def loss(self, name: str, values: F32) -> float:
        """Of the model's results, with other values of this weight."""


def sums_of(model: Model, inputs: Inputs) -> InputSums:
    if isinstance(model, BertEncoder):
        return EncoderSums(model, inputs)  # type: ignore[arg-type]
    return DecoderSums(decoder_of(model), inputs)  # type: ignore[arg-type]


def probes_of(model: Model, inputs: Inputs) -> Probes:
    if isinstance(model, BertEncoder):
        return EncoderProbes(model, inputs)  # type: ignore[arg-type]
    return DecoderProbes(model, inputs)  # type: ignore[arg-type]


def _sensitivity(probes: Probes, weight: Weight) -> float:
    """Quantise a weight alone, run the remaining model, divide the loss by the squared step.

    The step of a linear weight counts in output error (its geometry's level), so that weights compare.
    """
    step, values = weight.probed()
    return max(probes.loss(weight.name, values), 1e-9) / step**2


# --- in this process ----------------------------------------------------------------------------------


class Measurements:
    """Of one model, in this process."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def geometries(
        self, inputs: Inputs, transform: str, block_of: Callable[[str], int], scratch: Scratch
    ) -> dict[str, Callable[[], Geometry]]:
        """Name of a linear weight -> what reads the geometry of its input in the dense model. One layer's moments are
        in memory at a time.

        block_of : the block size of a weight
        """
        sums = sums_of(self._model, inputs)
        geometries: dict[str, Callable[[], Geometry]] = {}
        for moments, readers in zip(_summed(self._batches(sums, inputs)), sums.readers, strict=True):
            for stage, names in readers.items():
                geo = geometry(moments.pop(stage), transform, block_of(names[0]))
                geometries |= dict.fromkeys(names, scratch.geometry(geo))
        return geometries

    def _batches(self, sums: InputSums, inputs: Inputs) -> list[Iterator[dict[str, Sums]]]:
        """The sums of every batch, layer after layer."""
        return [sums.of_batch(i) for i in range(sums.count)]

    def sensitivities(
        self, weights: Sequence[Weight], inputs: Inputs
    ) -> Iterator[tuple[str, Callable[[], float]]]:
        """For every weight, its name and a function that measures the loss of the results per squared step."""
        probes = probes_of(self._model, inputs)
        for weight in weights:
            yield weight.name, partial(_sensitivity, probes, weight)


def _summed(batches: Sequence[Iterator[dict[str, Sums]]]) -> Iterator[dict[str, Moments]]:
    """For each layer: stage -> the moments of its input, over all batches in order."""
    while True:
        moments: dict[str, Moments] = {}
        for batch in batches:
            for stage, (count, product, total) in next(batch, {}).items():
                moments.setdefault(stage, Moments(len(total))).add_sums(count, product, total)
        if not moments:
            return
        yield moments


def measure(
    weights: Mapping[str, Weight],
    inputs: Inputs,
    measurements: Measurements,
    report: Progress,
    journal: NoJournal,
) -> None:
    """Set the sensitivity of each weight, from the journal where it is kept."""
    kept = [name for name in weights if journal.has_value(f"sensitivity of {name}")]
    done = 0

    def note(name: str, measured: Callable[[], float]) -> None:
        nonlocal done
        weights[name].sensitivity = journal.value(f"sensitivity of {name}", measured)
        report("sensitivity", done := done + 1, len(weights))

    for name in kept:
        note(name, lambda: 0.0)
    others = [weight for name, weight in weights.items() if name not in kept]
    if others:
        for name, measured in measurements.sensitivities(others, inputs):
            note(name, measured)


# --- on workers ---------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """A model and a file of its inputs that workers read."""

    source: str
    files: Files
    inputs: str


class _SumsTask(NamedTuple):
    inputs: _Inputs
    batch: int
    out: str


class _Probe(NamedTuple):
    """What a worker lacks of a weight: the geometry of a linear one, the scales of a table."""

    geometry: Geometry | None
    scales: F32 | None
    row_transform: tuple[str, int] | None

    def weight(self, name: str, read: Callable[[], F32]) -> Weight:
        if self.scales is not None:
            assert self.row_transform is not None
            return Weight.of_table(name, read, *self.row_transform, self.scales)
        assert self.geometry is not None
        geo = self.geometry
        return Weight.of_matrix(name, read, lambda: geo)


class _ProbeTask(NamedTuple):
    inputs: _Inputs
    name: str
    probe: str  # the file of a _Probe


#: held by every task: layers share scratch memory of one thread, and a worker may have several. Kernels have threads
#: of their own, so tasks beside each other would gain nothing.
_lock = threading.Lock()


@lru_cache(maxsize=1)
def _model(source: str, files: Files) -> Model:
    path = Path(source)
    if files_of(open_source(path)) != files:
        raise ValueError(f"{source} is another checkpoint on a worker than where the run was started")
    # as in `compress_model`, decoded weights are mapped
    return (
        load_gguf(path, held=Scratch(scratch_folder()).mapped)
        if path.is_file() and is_gguf(path)
        else load(source)
    )


def _read(inputs: _Inputs) -> tuple[Model, Inputs]:
    model = _model(inputs.source, inputs.files)
    return model, json.loads(Path(inputs.inputs).read_text("utf-8"))


@lru_cache(maxsize=1)
def _sums(inputs: _Inputs) -> InputSums:
    return sums_of(*_read(inputs))


@lru_cache(maxsize=1)
def _probes(inputs: _Inputs) -> Probes:
    return probes_of(*_read(inputs))


@blas
def _sums_task(task: _SumsTask) -> None:
    """The sums of one batch, to a file, layer after layer: those of all layers together may exceed the memory."""
    with _lock, output.replacing(task.out) as file:
        for of_layer in _sums(task.inputs).of_batch(task.batch):
            pickle.dump(of_layer, file, protocol=5)


def _read_sums(path: str) -> Iterator[dict[str, Sums]]:
    """What `_sums_task` wrote, layer after layer; the file goes at the end."""
    with open(path, "rb") as file:
        while file.peek(1):
            yield pickle.load(file)
    Path(path).unlink()


@blas
def _probe_task(task: _ProbeTask) -> float:
    probe: _Probe = pickle.loads(Path(task.probe).read_bytes())
    with _lock:
        probes = _probes(task.inputs)
        return _sensitivity(probes, probe.weight(task.name, partial(probes.values, task.name)))


class MeasurementsOnWorkers(Measurements):
    """The same by workers, which read the model from its folder or file.

    parts : where inputs, probes and sums are written
    """

    def __init__(self, model: Model, parts: PartsFolder) -> None:
        super().__init__(model)
        self._folder = parts

    def _shared(self, name: str, inputs: Inputs) -> _Inputs:
        text = json.dumps(list(inputs))
        # the name of a file is what workers remember it by
        path = self._folder.path / f"{name}-{digest([text])}.json"
        output.write_text(path, text)
        return _Inputs(self._folder.source, self._folder.files, str(path))

    def _batches(self, sums: InputSums, inputs: Inputs) -> list[Iterator[dict[str, Sums]]]:
        shared = self._shared("moments", inputs)
        outs = [str(self._folder.path / f"moments-{i}.pickle") for i in range(sums.count)]
        tasks = (_SumsTask(shared, i, out) for i, out in enumerate(outs))
        with closing(run_tasks(self._folder.client, _sums_task, tasks)) as results:
            for _ in results:
                pass
        return [_read_sums(out) for out in outs]

    def sensitivities(
        self, weights: Sequence[Weight], inputs: Inputs
    ) -> Iterator[tuple[str, Callable[[], float]]]:
        shared = self._shared("probes", inputs)

        def tasks() -> Iterator[_ProbeTask]:
            for i, weight in enumerate(weights):
                path = self._folder.path / f"probe-{i}.pickle"
                path.write_bytes(pickle.dumps(_Probe(weight.geometry, weight.scales, weight.row_transform)))
                yield _ProbeTask(shared, weight.name, str(path))

        with closing(run_tasks(self._folder.client, _probe_task, tasks())) as results:
            for task, sensitivity in results:
                Path(task.probe).unlink()
                yield task.name, lambda value=sensitivity: value  # type: ignore[misc]
