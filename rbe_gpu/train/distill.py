"""distill: train the integers of a compressed model so that its vectors, or its predictions, are the dense model's.

The student is the model of a compressed file, the teacher the dense one. Latents of all weights in grid codes, column
scales, biases and norms are trained on text (`quantizer`, `objective`); the size falls from that of the start file
to the target while the loss is held down, and then stays (`schedule`; Oktay et al. 2020, "Scalable model compression
by entropy penalized reparameterization", steers the same trade-off by a price). The result has the codecs of the
start file and is loaded without PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import output
from ..blocks import RBEBlocks
from ..container import Writer, load_file
from ..container import file_bytes as bytes_of
from ..evaluate import Agreement
from ..evaluate_decoders import Prediction
from ..models.architectures import Model, architecture, is_gguf
from ..models.compress import Progress, compress_model
from ..models.decoder import Decoder
from ..models.dense_modules import PREFIX
from ..models.load import load
from ..models.source import FLOATS, open_source
from ..threads import get_num_threads
from .held_out import digest

if TYPE_CHECKING:
    from .loop import TrainingStatus
    from .measures import Measure
    from .quantizer import Grid
    from .task import Task
    from .trainer import Trainer

#: Calibration is good down to here, of models that make vectors and of those that predict tokens; below it states are
#: noise and gradients too, so training goes down from here.
START_RATIO, START_RATIO_OF_PREDICTIONS = 16.0, 8.0
LEARNING_RATE = 0.01  # 100 steps of one sign change an integer by 1
PRECISIONS = ("float32", "bfloat16")
_RECIPE = 7  # raised when the same arguments begin to give another file


@dataclass(frozen=True)
class DistillSummary:
    """The result of `distill`.

    Attributes
    ----------
    path, file_bytes : the file
    dense_bytes : the float tensors that the dense model reads, as float32
    steps, minutes : of training, those before a resumption included
    start, result : of the start file, and of the written one, on the held-out texts: `Agreement` of the vectors with
        the dense model's, or how its tokens are predicted (`rbe_gpu.evaluate_decoders.Prediction`)
    curve : (steps, minutes, estimated bytes, measure of the student on the held-out texts) at every evaluation; the
        measure is a tuple with the fields "cosine", or "kl" and "top_1" (`rbe_gpu.train.measures`)
    interrupted : whether the run was interrupted; the file is then of the best state so far, and `resume` continues
    is_start : whether the file holds the tensors and config of the start file: its size is within the target, and the
        trained state, which had to be coarsened to the target after training, was no better on the held-out texts
    """

    path: Path
    file_bytes: int
    dense_bytes: int
    steps: int
    minutes: float
    start: Agreement | Prediction
    result: Agreement | Prediction
    curve: tuple[tuple[int, float, float, Measure], ...]
    interrupted: bool
    is_start: bool

    @property
    def ratio(self) -> float:
        """dense float32 bytes / file bytes."""
        return self.dense_bytes / self.file_bytes


def dense_bytes_of(model: Path) -> int:
    """Bytes of the float tensors that a model folder or GGUF file is read for, as float32."""
    source = open_source(model)
    return sum(4 * prod(source.entry(n)[1]) for n in source.files if source.entry(n)[0] in FLOATS)


def start_path(out: Path) -> Path:
    """Where `distill` keeps the calibrated file that it starts from."""
    return out.with_name(f".{out.name}.start")


def calibrated_start(
    model: Path, texts: Sequence[str], ratio: float, out: Path, resume: bool, progress: Progress | None = None
) -> Path:
    """The calibrated file of `ratio` that training starts from, at `start_path(out)`.

    resume : take one that is there, of the run that is resumed
    """
    path = start_path(out)
    if not (resume and path.is_file()):
        compress_model(model, path, ratio=ratio, calibrate=texts, progress=progress)
    return path


class _Start:
    """The file that training starts from."""

    def __init__(self, path: Path, teacher: Model) -> None:
        self.path = path
        self.tensors, self.config = load_file(path)
        self.file_bytes = path.stat().st_size
        self.model = load(path)
        if type(self.model) is not type(teacher) or self.model.config != teacher.config:
            raise ValueError(f"{path} is not of this model; compress it with rbe_gpu.compress_model")
        made = architecture(teacher.config)
        used = dict(made.tensor_shapes(teacher.config))
        canonical = {name: made.canonical_name(name) for name in self.tensors}
        self.names = {name: short for name, short in canonical.items() if short in used}

    def trained(self) -> dict[str, Any]:
        """The tensors of the model by canonical name."""
        return {short: self.tensors[name] for name, short in self.names.items()}

    def fixed(self) -> dict[str, NDArray[np.float32]]:
        """The tensors of Dense modules, which are not trained, decoded."""
        dense = {name: value for name, value in self.tensors.items() if name.startswith(PREFIX)}
        return {
            name: value.decode() if isinstance(value, RBEBlocks) else value for name, value in dense.items()
        }

    def config_with(self, facts: Mapping[str, Any], int8: list[str]) -> dict[str, Any]:
        """The config of a trained file."""
        source = {**self.config.get("source", {}), "distilled": dict(facts)}
        return {**self.config, "source": source, "int8_activations": int8}

    def tensors_with(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """All tensors of a file by their names in it. trained : by canonical name"""
        return {name: trained.get(self.names.get(name, ""), value) for name, value in self.tensors.items()}


def distill(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    out: str | os.PathLike[str],
    ratio: float | None = None,
    file_bytes: int | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    start: str | os.PathLike[str] | None = None,
    held_out: Sequence[str] | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str | None = None,
    learning_rate: float = LEARNING_RATE,
    resume: bool = False,
    progress: Callable[[TrainingStatus], None] | None = None,
    calibration_progress: Progress | None = None,
) -> DistillSummary:
    """Train a compressed model to reproduce the dense one's vectors, or predictions, at a given file size.

    Of encoders, and of decoders that make vectors, the vectors are compared; of decoders that generate text the
    predictions of the next token (docs/distill.md).

    Needs PyTorch (`pip install 'rbe-gpu[train]'`). With `steps`, the same arguments give the same file on the same
    machine, with the same number of threads; a run by `minutes` depends on the machine's speed. An interrupt
    (KeyboardInterrupt) ends training with the best file so far. When training is over, there is a checkpoint of its
    end until the file is written and measured: an interrupt or an error there loses nothing, `resume` continues.

    The file is within the size, exactly. Where the best state exceeds it, because its size was an estimate, steps of
    the grids are made coarser; is it then no better than a start file that is within the size, `out` gets the tensors
    of the start file (`DistillSummary.is_start`).

    Memory: some 45 bytes per weight (the teacher, latents, gradients and their moments, the best state), 1 GB for
    MiniLM, and activations: per layer, token and unit of the hidden size 14 float32 values of a BERT encoder, 0.4 GB
    for 32 texts of 96 tokens, and 23 of a decoder of SmolLM2's shape. Logits take 0.3 GB in training
    (`rbe_gpu.train.prediction`); the measurement of the files on held-out text has those of a whole window in
    float64: a process grew by 0.4 GB for 256 tokens of a vocabulary of 49,152, by 2.1 GB for one of 262,144.

    Parameters
    ----------
    model : the folder of the dense model, or a decoder in GGUF
    texts : what to train on; thousands, of the kind that the model will read. A repeated one counts once. Those of a
        model that predicts tokens are joined by an empty line
    out : the file to write, by custom `<name>.rbe.safetensors`. The checkpoint is `.NAME.checkpoint` beside it,
        replaced every five minutes and at the end of training, and removed when the file is written and measured
    ratio, file_bytes : the size of the whole file at most: dense float32 bytes / ratio, or bytes; give one
    minutes, steps : how long to train; give one
    start : an `.rbe.safetensors` file of this model in grid codes, calibrated or trained; None: the model is
        calibrated on the texts at `ratio`, or START_RATIO (predictions: START_RATIO_OF_PREDICTIONS) if that is lower
    held_out : texts to choose the best state on, which are not trained on; None: one of 16 of `texts`, 256 at most.
        Of a model that predicts tokens a sixteenth of the characters, those of some 16,384 tokens at most, for which
        one text may be cut; of texts that are passed it reads some 32,768 tokens, of texts in the order of a hash
    batch_size : texts, or windows of tokens, of a step; None: 32 texts, 8 windows
    max_tokens : texts are truncated to so many tokens: short texts train faster, and long ones read well too; of a
        model that predicts tokens the window that tokens are predicted in, at most its positions. None: 96, a window
        256
    seed : of the order of the texts
    device : "cpu", "cuda" or "cuda:N"
    precision : of the matmuls, "float32" or "bfloat16" with float32 weights, sums and logits; None: bfloat16 on a
        GPU. On a CPU with instructions for it (AVX-512 BF16), steps of MiniLM take 0.55 of the time
    learning_rate : at first, in steps of the grid per step of training; of scales, biases and norms a tenth of it, of
        their own units. A trained file that is only to be trained longer gains more with less, say 0.003
    resume : continue from the checkpoint of a run with the same model, start, texts and options. A different length
        is allowed. Without it the model is calibrated again, also where a stopped run has left a calibrated file
    progress : called after every step
    calibration_progress : as `progress` of `rbe_gpu.calibrate`, where the model is calibrated first

    Raises
    ------
    ImportError
        PyTorch is not installed.
    OSError
        A file is missing, or `out` cannot be written.
    MemoryError
        PyTorch gets too little memory for `batch_size` and `max_tokens`.
    ValueError
        An option is out of range, a size cannot be reached, there are too few texts, the start file is not of this
        model or not in grid codes, or the checkpoint is of another run.
    """
    _check_torch()
    from . import checkpoint
    from .loop import Loop, set_threads
    from .memory import memory_errors
    from .trainer import Trainer

    model, out = Path(model), Path(out)
    _check_options(ratio, file_bytes, minutes, steps, learning_rate)
    precision = _precision_of(precision, device)
    if not model.is_dir() and not is_gguf(model):
        raise ValueError(f"{model} is not a model folder or GGUF file; training needs the dense model")
    output.destination(out)
    teacher = load(model)
    task = _task_of(teacher, model)
    batch_size = task.batch_size if batch_size is None else batch_size
    max_tokens = task.max_tokens if max_tokens is None else max_tokens
    task.check_options(batch_size, max_tokens)
    texts, held_out = _split(task, texts, held_out)
    sequences, held_out_sequences = (task.sequences(some, max_tokens) for some in (texts, held_out))
    task.check(sequences, held_out_sequences, batch_size)
    dense_bytes = dense_bytes_of(model)
    target = file_bytes if file_bytes is not None else floor(dense_bytes / ratio) if ratio else 0
    if start is None:
        lowest = START_RATIO_OF_PREDICTIONS if isinstance(teacher, Decoder) else START_RATIO
        wanted = min(dense_bytes / target, lowest)
        first = calibrated_start(model, texts, wanted, out, resume, calibration_progress)
    else:
        first = Path(start)
    begin = _Start(first, teacher)
    set_threads(get_num_threads())
    identity = {
        "start file": hashlib.sha256(first.read_bytes()).hexdigest(),
        "version of the package": str(_RECIPE),
        "texts": digest(*texts, "", *held_out),
        "size": str(target),
        "batch size, tokens, precision, learning rate or seed": (
            f"{batch_size}, {max_tokens}, {precision}, {learning_rate}, {seed}"
        ),
    }
    path = checkpoint.path_for(out)
    interrupted = False
    with memory_errors(batch_size, max_tokens):
        trainer = Trainer(
            task,
            begin.trained(),
            begin.fixed(),
            sequences,
            held_out_sequences,
            batch_size,
            seed,
            device,
            precision,
            learning_rate,
        )
        loop = Loop(trainer, begin.file_bytes, target, steps, minutes, path, identity)
        if loop.fixed_bytes >= target:
            highest = floor(100 * dense_bytes / (loop.fixed_bytes + 1)) / 100
            raise ValueError(
                f"the target is {target} bytes, but scales, dense tensors, tokenizer and header alone take "
                f"{floor(loop.fixed_bytes)}; the highest reachable ratio is below {highest:g}"
            )
        if resume and path.exists():
            loop.resume()
        try:
            loop.run(progress)
        except KeyboardInterrupt:
            interrupted = True
        loop.finish()
    target_of_start = begin.config.get("source", {}).get("target", {})
    facts = {"steps": loop.steps, "texts": len(texts), "start": target_of_start, "seed": seed}
    written, before, after, is_start = _write_best(out, begin, trainer, facts, target, held_out)
    if not interrupted:
        for left in (path, start_path(out)) if start is None else (path,):
            left.unlink(missing_ok=True)
    return DistillSummary(
        out,
        written,
        dense_bytes,
        loop.steps,
        loop.minutes,
        before,
        after,
        tuple(loop.curve),
        interrupted,
        is_start,
    )


def _split(
    task: Task, texts: Sequence[str], held_out: Sequence[str] | None
) -> tuple[list[str], Sequence[str]]:
    """The different texts to train on, and those to choose the best state on, which are not among them."""
    texts = list(dict.fromkeys(texts))
    if held_out is None:
        return task.split(texts)
    excluded = set(held_out)
    return [t for t in texts if t not in excluded], task.measured(list(dict.fromkeys(held_out)))


def _write_best(
    out: Path,
    start: _Start,
    trainer: Trainer,
    facts: Mapping[str, Any],
    target: int,
    held_out: Sequence[str],
) -> tuple[int, Agreement | Prediction, Agreement | Prediction, bool]:
    """Write the trained tensors, or those of the start file, where that is within the target and no worse.

    Returns
    -------
    bytes of the file, measures of the start file and of the written one on the held-out texts, and whether it has the
    tensors of the start file
    """
    task, tensors = trainer.task, trainer.tensors()
    # chosen first: the names are in the file, whose size counts
    config = start.config_with(facts, task.int8_activations(tensors, held_out))
    coarsened = _coarsen(tensors, trainer.grids, start, config, target)
    written = _write(out, start.tensors_with(tensors), config)
    quality = task.quality(held_out)
    after, before = quality(load(out)), quality(start.model)
    if not coarsened or bytes_of(start.tensors, start.config) > target or _is_better(after, before):
        return written, before, after, False
    return _write(out, start.tensors, start.config), before, before, True


def _is_better(new: Agreement | Prediction, old: Agreement | Prediction) -> bool:
    if isinstance(new, Prediction) and isinstance(old, Prediction):
        return new.kl < old.kl
    assert isinstance(new, Agreement)
    assert isinstance(old, Agreement)
    return new.cosine_mean > old.cosine_mean


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ImportError("training needs PyTorch; pip install 'rbe-gpu[train]'") from None


def _check_options(
    ratio: float | None,
    file_bytes: int | None,
    minutes: float | None,
    steps: int | None,
    learning_rate: float,
) -> None:
    for names, values in (
        ("ratio= or file_bytes=", (ratio, file_bytes)),
        ("minutes= or steps=", (minutes, steps)),
    ):
        if sum(value is not None for value in values) != 1:
            raise ValueError(f"give one of {names}")
    options = {"ratio": ratio, "file_bytes": file_bytes, "minutes": minutes, "steps": steps}
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} is not a positive number")
    if not 0 < learning_rate <= 1:
        raise ValueError(f"learning_rate={learning_rate} is not above 0 and at most 1")


def _precision_of(precision: str | None, device: str) -> str:
    """The precision that training takes on a device; a ValueError for one of them that it does not take."""
    import torch

    if re.fullmatch(r"cpu|cuda(:\d+)?", device, re.ASCII) is None:
        raise ValueError(f'device={device!r}; use "cpu" or "cuda"')
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision={precision!r}; use one of {PRECISIONS}")
    if device == "cpu":
        return precision or "float32"
    if not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but PyTorch sees no GPU; use device='cpu'")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise ValueError(f"device={device!r}, but the last GPU that PyTorch sees is cuda:{count - 1}")
    return precision or "bfloat16"


def _task_of(model: Model, source: Path) -> Task:
    """What training asks of a dense model; a ValueError for one that it does not take."""
    from .prediction_task import PredictionTask
    from .vectors_task import VectorsTask

    if model.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json, so no text can run through the model")
    return PredictionTask(model) if isinstance(model, Decoder) else VectorsTask(model)


def _write(out: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Write a file; its bytes."""
    with Writer(out) as writer:
        writer.config = dict(config)
        for name, value in tensors.items():
            writer.add(name, value)
        return writer.nbytes


def _coarsen(
    tensors: dict[str, Any], grids: Mapping[str, Grid], start: _Start, config: Mapping[str, Any], target: int
) -> bool:
    """Replace trained tensors by coarser ones until the file with this config is within the target; whether any
    had to be.

    One weight after the other, the smallest first: many latents lie at the edge of their step after training, and
    steps coarser by 0.1% take 2% of the bytes.
    """
    coarsened = False
    while (size := bytes_of(start.tensors_with(tensors), config)) > target:
        if not any(grid.integers().any() for grid in grids.values()):
            raise ValueError(f"the target is {target} bytes, but a file without any integers takes {size}")
        coarsened = True
        by = 1.0 + max(0.001, 0.7 * (size / target - 1))
        for name in sorted(grids, key=lambda name: grids[name].size):
            grids[name].coarsen(by)
            coarser = grids[name].stored()
            size += coarser.nbytes - tensors[name].nbytes
            tensors[name] = coarser
            if size <= target:
                break
    return coarsened
