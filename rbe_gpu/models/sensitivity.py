"""What a calibration measures of a dense BERT encoder: moments of the inputs of its weights, and how sensitive its
vectors are to each weight. In this process, or as tasks of workers.

Workers get batches of texts for the moments, and weights for the sensitivities. They return the float32 products of
each batch, which this process sums in the order of the batches: the sums have the bits of one process.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import output
from ..cluster import run_tasks
from ..feedback import Geometry, Moments, input_sums, quantize_matrix, quantize_table
from ..layers import RBELinear
from ..threads import blas
from ..workspace import Workspace
from .bert import BertEncoder
from .encoder_stages import Batch, Stages, batches, embedded, loss, tables_of, vectors
from .journal import digest
from .load import load
from .parts_folder import Files, PartsFolder, files_of
from .source import open_source

F32 = NDArray[np.float32]
Sums = tuple[int, F32, NDArray[np.float64]]


class Probe(NamedTuple):
    """A weight quantised alone: with the step and geometry of a linear weight, or the scales of a table."""

    step: float
    geometry: Geometry | None
    scales: F32 | None


def stages_of(model: BertEncoder) -> list[Stages]:
    ws = Workspace()  # of all layers: those of all-mpnet-base-v2 with one each took 100 MB a layer
    return [Stages(model, i, ws) for i in range(len(model.layers))]


# --- in this process ----------------------------------------------------------------------------------


def _layer_sums(layer: Stages, part: Batch) -> dict[str, Sums]:
    """The sums of each stage's input for one batch, whose states move on to the next layer."""
    x = part.dense
    heads = layer.heads(x, part.lengths)
    y = layer.attended(heads, x)
    inner = layer.inner(y)
    part.dense = layer.finished(inner, y)
    inputs = {"qkv": x, "output": heads, "up": y, "down": inner}
    return {stage: input_sums(values) for stage, values in inputs.items()}


class Measurements:
    """Of one model, in this process."""

    def __init__(self, model: BertEncoder) -> None:
        self._model = model

    def moments(self, texts: Sequence[str]) -> Iterator[dict[str, Moments]]:
        """Of every layer in order, by stage: the moments of its inputs in the dense model."""
        parts, tables = batches(self._model, texts), tables_of(self._model)
        for part in parts:
            part.dense = embedded(self._model, tables, part.ids, part.lengths)
        for layer in stages_of(self._model):
            yield _summed(layer, (_layer_sums(layer, part) for part in parts))

    def sensitivities(
        self, probe_of: Mapping[str, Callable[[], Probe]], texts: Sequence[str]
    ) -> Iterator[tuple[str, Callable[[], float]]]:
        """For every weight, a function that measures the loss of the vectors (1 - cosine) per squared step."""
        probes = Probes(self._model, texts)
        for name, probe in probe_of.items():
            yield name, lambda name=name, probe=probe: probes.sensitivity(name, probe())  # type: ignore[misc]


def _summed(layer: Stages, sums: Iterator[dict[str, Sums]]) -> dict[str, Moments]:
    moments = {stage: Moments(layer.linears[names[0]].in_features) for stage, names in layer.names.items()}
    for of_batch in sums:
        for stage, values in of_batch.items():
            moments[stage].add_sums(*values)
    return moments


class Probes:
    """The model on a few texts, of which one weight at a time is replaced."""

    def __init__(self, model: BertEncoder, texts: Sequence[str]) -> None:
        self._model = model
        self._parts = parts = batches(model, texts)
        self._tables = tables_of(model)
        self._layers = stages_of(model)
        states = [[embedded(model, self._tables, p.ids, p.lengths) for p in parts]]
        for layer in self._layers:
            states.append([layer.run(x, p.lengths) for x, p in zip(states[-1], parts, strict=True)])
        self._states = states
        self._dense = vectors(model, states[-1], parts)

    def sensitivity(self, name: str, probe: Probe) -> float:
        """Quantise a weight alone, run the remaining model, divide the loss by the squared step.

        The step of a linear weight counts in output error (its geometry's level), so that weights compare.
        """
        step = probe.step
        if name in self._tables:
            assert probe.scales is not None
            lossy = {**self._tables, name: quantize_table(self._tables[name], step, probe.scales).decode()}
            x = [embedded(self._model, lossy, p.ids, p.lengths) for p in self._parts]
            return self._finish(x, 0) / step**2
        index = next(i for i, layer in enumerate(self._layers) if name in layer.linears)
        layer = self._layers[index]
        linear = layer.linears[name]
        assert probe.geometry is not None
        decoded = quantize_matrix(np.asarray(linear.weight, np.float32), probe.geometry, step).decode()
        probed = layer.with_linears({name: RBELinear(decoded, linear.bias, linear.activation)})
        x = [probed.run(a, p.lengths) for a, p in zip(self._states[index], self._parts, strict=True)]
        return self._finish(x, index + 1) / step**2

    def _finish(self, x: list[F32], first: int) -> float:
        for layer in self._layers[first:]:
            x = [layer.run(a, p.lengths) for a, p in zip(x, self._parts, strict=True)]
        return max(loss(self._model, x, self._parts, self._dense), 1e-9)


# --- on workers ---------------------------------------------------------------------------------------


class _Texts(NamedTuple):
    """A model and a file of texts that workers read."""

    source: str
    files: Files
    texts: str


class _MomentsTask(NamedTuple):
    texts: _Texts
    batch: int
    out: str


class _ProbeTask(NamedTuple):
    texts: _Texts
    name: str
    probe: str


#: held by every task: layers share scratch memory of one thread, and a worker may have several. Kernels have threads
#: of their own, so tasks beside each other would gain nothing.
_lock = threading.Lock()


@lru_cache(maxsize=1)
def _model(source: str, files: Files) -> BertEncoder:
    if files_of(open_source(Path(source))) != files:
        raise ValueError(f"{source} is another checkpoint on a worker than where the run was started")
    model = load(source)
    assert isinstance(model, BertEncoder)
    return model


@lru_cache(maxsize=1)
def _batches(texts: _Texts) -> tuple[BertEncoder, list[Batch]]:
    model = _model(texts.source, texts.files)
    return model, batches(model, json.loads(Path(texts.texts).read_text("utf-8")))


@lru_cache(maxsize=1)
def _probes(texts: _Texts) -> Probes:
    model = _model(texts.source, texts.files)
    return Probes(model, json.loads(Path(texts.texts).read_text("utf-8")))


@blas
def _moments_task(task: _MomentsTask) -> None:
    """The sums of one batch in all layers, to a .npz file."""
    with _lock:
        arrays = _moments(task)
    with output.replacing(task.out) as file:
        np.savez(file, **arrays)


def _moments(task: _MomentsTask) -> dict[str, Any]:
    model, parts = _batches(task.texts)
    part = parts[task.batch]
    part.dense = embedded(model, tables_of(model), part.ids, part.lengths)
    arrays: dict[str, Any] = {}
    for i, layer in enumerate(stages_of(model)):
        for stage, values in _layer_sums(layer, part).items():
            arrays |= {f"{i} {stage} {j}": value for j, value in enumerate(values)}
    part.dense = np.empty((0, 0), np.float32)
    return arrays


@blas
def _probe_task(task: _ProbeTask) -> float:
    probe: Probe = pickle.loads(Path(task.probe).read_bytes())
    with _lock:
        return _probes(task.texts).sensitivity(task.name, probe)


class MeasurementsOnWorkers(Measurements):
    """The same by workers, which read the model from its folder.

    parts : where texts, probes and sums are written
    """

    def __init__(self, model: BertEncoder, parts: PartsFolder) -> None:
        super().__init__(model)
        self._folder = parts

    def _texts(self, name: str, texts: Sequence[str]) -> _Texts:
        # the name of a file is what workers remember it by
        path = self._folder.path / f"{name}-{digest(texts)}.json"
        output.write_text(path, json.dumps(list(texts)))
        return _Texts(self._folder.source, self._folder.files, str(path))

    def moments(self, texts: Sequence[str]) -> Iterator[dict[str, Moments]]:
        shared = self._texts("moments", texts)
        count = len(batches(self._model, texts))
        outs = [str(self._folder.path / f"moments-{i}.npz") for i in range(count)]
        tasks = (_MomentsTask(shared, i, out) for i, out in enumerate(outs))
        with closing(run_tasks(self._folder.client, _moments_task, tasks)) as results:
            for _ in results:
                pass
        for i, layer in enumerate(stages_of(self._model)):
            yield _summed(layer, (_read_sums(out, i, layer) for out in outs))
        for out in outs:
            Path(out).unlink()

    def sensitivities(
        self, probe_of: Mapping[str, Callable[[], Probe]], texts: Sequence[str]
    ) -> Iterator[tuple[str, Callable[[], float]]]:
        shared = self._texts("probes", texts)

        def tasks() -> Iterator[_ProbeTask]:
            for i, (name, probe) in enumerate(probe_of.items()):
                path = self._folder.path / f"probe-{i}.pickle"
                path.write_bytes(pickle.dumps(probe()))
                yield _ProbeTask(shared, name, str(path))

        with closing(run_tasks(self._folder.client, _probe_task, tasks())) as results:
            for task, sensitivity in results:
                Path(task.probe).unlink()
                yield task.name, lambda value=sensitivity: value  # type: ignore[misc]


def _read_sums(path: str, index: int, layer: Stages) -> dict[str, Sums]:
    with np.load(path) as arrays:
        return {
            stage: (
                int(arrays[f"{index} {stage} 0"]),
                arrays[f"{index} {stage} 1"],
                arrays[f"{index} {stage} 2"],
            )
            for stage in layer.names
        }
