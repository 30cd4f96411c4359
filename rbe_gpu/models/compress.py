"""compress_model: compress a checkpoint, tensor by tensor, into one `.rbe.safetensors` file.

Word and position embedding tables are compressed as `RBEVectors`, so that any row decodes alone, and other
matrices with both sides of 32 or more as `RBEMatrix`. All other tensors stay dense: biases, norms, small matrices,
tensors of three and more axes, and any tensor that compression would make larger. float16, bfloat16 and float64
tensors are converted to float32; integer tensors are unchanged, except that `position_ids`, which contain
0, 1, 2, ..., are omitted. Of a model folder, tensors that the model does not read are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import dispatch, output, transforms
from ..blocks import RBEBlocks
from ..container import Writer
from ..encode import GRADES
from ..json_checks import dump_json
from ..threads import blas, get_num_threads
from .architectures import architecture, is_gguf
from .bert_tensors import block_of
from .compress_tasks import Budget, EncodedTensor, TensorTasks, encode_tensor, stored, widened
from .file_budget import budget_of_ratio
from .journal import Journal, NoJournal, digest
from .load import load, load_gguf
from .parts_folder import PartsFolder
from .scratch import Scratch
from .source import FLOATS, Source, open_source
from .stored_tokenizer import ARRAY as TOKENIZER_ARRAY

if TYPE_CHECKING:
    from .calibrate import AnyCalibration

_CHECK_TEXTS = 64
SMALLEST_SIDE = 32  # smaller matrices lose more to padding than they gain

_TABLES = re.compile(
    r"(^|\.)(word_embeddings|position_embeddings|embed_tokens|tok_embeddings|wte|wpe)\.weight$"
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the result. `dense_bytes` as float32 (0 for integers); `relative_error` 0 when dense."""

    name: str
    shape: tuple[int, ...]
    kind: str
    codes: str
    nbytes: int
    dense_bytes: int
    relative_error: float

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(prod(self.shape), 1)


@dataclass(frozen=True)
class CompressSummary:
    """The result of `compress_model`.

    Attributes
    ----------
    path : the file
    rows : one per tensor, in the order of the checkpoint's names
    file_bytes : all of the file
    dense_bytes : the float tensors of the result as float32
    relative_error : ||W - W'|| / ||W|| over all compressed tensors together
    notes : limitations of the result, e.g. that a model has no tokenizer, and weights that were left out
    """

    path: Path
    rows: tuple[TensorRow, ...]
    file_bytes: int
    dense_bytes: int
    relative_error: float
    notes: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """dense float32 bytes / file bytes; half of it against dense float16."""
        return self.dense_bytes / self.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """File bits / weights, everything counted."""
        return 32.0 / self.ratio if self.dense_bytes else 0.0

    @property
    def other_dense_bytes(self) -> int:
        return sum(row.nbytes for row in self.rows if row.kind == "dense")


# --- how tensors are stored ---------------------------------------------------------------------------


def kind_of(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """How a tensor is stored: "vectors", "matrix", "dense", or "dropped"."""
    if dtype not in FLOATS:
        return "dropped" if name.rpartition(".")[2] == "position_ids" else "dense"
    if len(shape) != 2 or min(shape) < SMALLEST_SIDE:
        return "dense"
    return "vectors" if _TABLES.search(name) else "matrix"


# --- the public function ------------------------------------------------------------------------------


@blas
def compress_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    grade: str | None = None,
    ratio: float | None = None,
    rmse: float | None = None,
    density: float | None = None,
    block: int | None = None,
    transform: str | None = None,
    basis: bool | str = "auto",
    codes: str | None = None,
    calibrate: Sequence[str] | AnyCalibration | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    client: Any = None,
) -> CompressSummary:
    """Compress a model folder, or a bare safetensors file, into one file.

    The source is mapped, and one tensor at a time is in memory; with `calibrate` a few layers, the hidden states of
    the texts, and the compressed model. The file appears when it is complete; after an exception an existing file at
    `out` is unchanged.

    Parameters
    ----------
    source : a model folder that `rbe_gpu.load` reads (docs/models.md), whose settings are stored too; or a
        .safetensors file
    out : the file to write, by custom `<name>.rbe.safetensors`
    ratio : for the whole model: dense float32 bytes of all float tensors that it reads / bytes of the file, at least
        this. The compressed tensors all get the same ratio.
    grade, rmse, density, basis, codes : for each tensor, as in `rbe_gpu.compress`
    block : 32, 64 or 128 for all tensors. None: 64, but where there is a transform the attention projections take
        the largest block up to 64 that divides the heads' width, which spares attention six of eight transforms
    transform : default: "dct"; with `calibrate`, "none"
    calibrate : texts to calibrate on, or the result of `rbe_gpu.calibrate`, for several ratios; needs `ratio` and a
        model folder with a tokenizer. Codes are then chosen for the least error of the outputs
        (`rbe_gpu.models.calibrate`), bits are allocated by sensitivity, and biases and norms are corrected. Meanwhile
        files beside `out` hold half the bytes of the float32 weights, and the decoded weights of a GGUF file.
        `basis` and `codes` do not apply. Of few texts (`allocation.FEW_TOKENS`) the result is compared with plain
        compression on 64 docstrings of Python's library, and the better one is written.
    resume : with texts to calibrate on: continue a run that was killed or interrupted, from the results that it left
        in the folder `.NAME.journal` beside `out`; the file has the bytes of a run without interruption
    progress : called after each tensor with its name, and the dense bytes done and to do in all
    client : a `distributed.Client`, whose workers compress the tensors, one a task (`rbe_gpu.models.compress_tasks`);
        with `calibrate` they measure moments and sensitivities (`rbe_gpu.models.sensitivity`).
        `source` and the folder of `out` are at paths that all of them can read and write. The file has the bytes of
        one process with as many threads as a worker, on the same kind of processor.

    Raises
    ------
    OSError
        A file is missing, or `out` cannot be written; of `client`, a `rbe_gpu.cluster.ClusterError`.
    ValueError
        A file is no safetensors file or model folder, a weight holds NaN or Inf (the message names it), the
        target is not one, or cannot be reached; `resume` without texts, or the results are of another model, texts,
        options or versions.
    BlockingIOError
        `resume`, and another process is writing them.
    """
    options: dict[str, Any] = {"grade": grade, "rmse": rmse, "density": density, "codes": codes}
    _check_target({**options, "ratio": ratio}, block)
    source, out = Path(source), Path(out)
    opened = open_source(source)
    for file in {id(f): f for f in opened.files.values()}.values():
        if out.exists() and out.samefile(file.path):
            raise ValueError(f"{out} is the checkpoint itself; write the result to another file")
    job = _Job(opened, block, transform or "dct", basis)
    if not job.dense_bytes:
        raise ValueError(f"{source} has no float tensors; there is nothing to compress")
    config = {**opened.config, "source": _made_from(opened, {**options, "ratio": ratio})}
    if calibrate is not None:  # room for every name in the header; what is measured replaces them
        made = opened.config.get("config")
        config["int8_activations"] = [] if made is None else list(architecture(made).linear_weights(made))
    budget = None
    if ratio is not None:
        kinds, size = job.kind_by_name, block or transforms.DEFAULT_BLOCK
        budget = budget_of_ratio(opened, kinds, ratio, size, config, job.dense_bytes, calibrate is not None)
    with ExitStack() as stack:
        parts = None if client is None else stack.enter_context(PartsFolder(client, opened, out))
        encoded: Mapping[str, Any] = {}
        if calibrate is not None:
            if budget is None or codes is not None:
                raise ValueError("calibrate= needs ratio= as its target, and no codes=")
            journal = _journal(opened, out, calibrate, (ratio, transform, block), resume, stack)
            calibration = _calibration(source, calibrate, opened, transform, block, progress, journal, parts)
            encoded = _calibrated(opened, calibration, budget, job.kind_by_name, progress, journal)
            if calibration.few and not _gains(calibration, encoded, job.plain(budget)):
                encoded = {}
                del config["int8_activations"]
            else:
                if progress is not None:
                    progress("int8", 0, 1)
                config["int8_activations"] = calibration.int8_activations(encoded)
        elif resume:
            raise ValueError("resume= goes with calibrate=")
        target = options if budget is None else {"codes": codes}
        with Writer(out) as writer, job.encoder(parts, encoded) as encode:
            writer.config = config
            rows, relative_error = job.write(
                writer, encode, encoded, target, budget, progress, halve=calibrate is not None
            )
            file_bytes = writer.nbytes
            if ratio is not None and file_bytes > job.dense_bytes / ratio:
                raise ValueError(
                    f"{source}: ratio={ratio:g} is not reached: {file_bytes} bytes; use a lower ratio"
                )
    return CompressSummary(out, rows, file_bytes, job.dense_bytes, relative_error, opened.notes)


#: encodes the tensor of a name for a target, with the budget of a ratio
_Encode = Callable[[str, Mapping[str, Any], "Budget | None"], EncodedTensor]


class _Job:
    """A checkpoint to compress: how each of its tensors is stored, and with which settings.

    Attributes
    ----------
    kind_by_name : `kind_of` of the tensors, without dropped ones
    dense_bytes : the float tensors as float32
    """

    def __init__(self, source: Source, block: int | None, transform: str, basis: bool | str) -> None:
        self.source = source
        self.kind_by_name = {
            name: kind
            for name in sorted(source.files)
            if (kind := kind_of(name, *source.entry(name)[:2])) != "dropped"
        }
        self.dense_bytes = sum(
            4 * prod(source.entry(n)[1]) for n in self.kind_by_name if source.entry(n)[0] in FLOATS
        )
        self._block, self._transform, self._basis = block, transform, basis

    def settings(self, name: str, target: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `rbe_gpu.compress` for a tensor."""
        block = block_of(name, self.source.config.get("config", {}), self._transform, self._block)
        kind = self.kind_by_name[name]
        return {"block": block, "transform": self._transform, "basis": self._basis, "kind": kind, **target}

    def plain(self, budget: Budget) -> dict[str, Any]:
        """The weights as they are without calibration, by the model's own names."""
        left = replace(budget)
        tensors = {}
        for name, kind in self.kind_by_name.items():
            if kind != "dense":
                value = encode_tensor(self.source, name, self.settings(name, {"ratio": left.ratio()})).value
                left.spend(value.nbytes, 4 * prod(value.shape))
                tensors[self.source.canonical(name)] = value
        return tensors

    @contextmanager
    def encoder(self, parts: PartsFolder | None, encoded: Mapping[str, Any]) -> Iterator[_Encode]:
        """A function that encodes a tensor that is not in `encoded`: in this process, or with `parts` by workers."""
        if parts is None:
            yield lambda name, target, _: encode_tensor(self.source, name, self.settings(name, target))
            return
        names = [
            name
            for name, kind in self.kind_by_name.items()
            if kind != "dense" and self.source.canonical(name) not in encoded
        ]
        with TensorTasks(self.source, parts, names, self.settings) as tasks:
            yield tasks.result

    def write(
        self,
        writer: Writer,
        encode: _Encode,
        encoded: Mapping[str, Any],
        target: Mapping[str, Any],
        budget: Budget | None,
        progress: Progress | None,
        halve: bool,
    ) -> tuple[tuple[TensorRow, ...], float]:
        """Add the tokenizer and all tensors to a file. Returns a row for each, and the error of the compressed ones.

        Parameters
        ----------
        encoded : tensors that are encoded already, by the model's own names
        target : of the others, without the ratio that `budget` leaves them
        halve : dense tensors are stored as float16
        """
        source = self.source
        rows: list[TensorRow] = []
        done = 0
        squared_error = energy = 0.0
        if source.tokenizer is not None:
            writer.add(TOKENIZER_ARRAY, source.tokenizer)
        for name, kind in self.kind_by_name.items():
            value = encoded.get(source.canonical(name))
            if kind == "dense" or isinstance(value, RBEBlocks):
                result = stored(source, name, value, halve)
            else:
                result = encode(
                    name, target if budget is None else {**target, "ratio": budget.ratio()}, budget
                )
            if kind != "dense":
                squared_error += result.relative_error**2 * result.energy
                energy += result.energy
            row = _row(name, result.value, result.relative_error)
            writer.add(name, result.value)
            rows.append(row)
            if budget is not None and kind != "dense":
                budget.spend(row.nbytes, row.dense_bytes)
            done += row.dense_bytes
            if progress is not None:
                progress(name, done, self.dense_bytes)
        return tuple(rows), float(np.sqrt(squared_error / energy)) if energy else 0.0


def _calibration(
    source: Path,
    texts: Sequence[str] | AnyCalibration,
    opened: Source,
    transform: str | None,
    block: int | None,
    progress: Progress | None,
    journal: NoJournal,
    parts: PartsFolder | None,
) -> AnyCalibration:
    """The calibration of a model folder on texts, or one that was made before, if it is of this folder."""
    from .calibrate import TRANSFORM, Calibration
    from .calibrate import calibrate as run
    from .calibrate_decoder import DecoderCalibration

    if not opened.config:
        raise ValueError(f"{source} is not a model folder; calibration runs the model on texts")
    if isinstance(texts, Calibration | DecoderCalibration):
        for name, file in opened.files.items():
            values = texts.values(opened.canonical(name))
            if values is not None and not np.array_equal(values, widened(file.array(name), name)):
                raise ValueError(
                    f"{source}: {name} is not the weight that was calibrated; calibrate this model"
                )
        return texts
    # decoded weights of a GGUF file are mapped, as those of a folder are: a model may be larger than memory
    model = (
        load_gguf(source, held=Scratch(journal.scratch).mapped)
        if source.is_file() and is_gguf(source)
        else load(source)
    )
    return run(
        model,
        texts,
        transform=transform or TRANSFORM,
        block=block,
        progress=progress,
        journal=journal,
        parts=parts,
    )


def _calibrated(
    opened: Source,
    calibration: AnyCalibration,
    budget: Budget,
    kind_by_name: Mapping[str, str],
    progress: Progress | None,
    journal: NoJournal,
) -> Mapping[str, Any]:
    """The calibrated weights, by the model's own names, within their part of the budget."""
    config = calibration.model.config
    used = dict(architecture(config).tensor_shapes(config))
    calibrated = {opened.canonical(n) for n, kind in kind_by_name.items() if kind != "dense"} & set(used)
    share = sum(4 * prod(used[name]) for name in calibrated) / budget.dense_bytes
    return calibration.compress(budget.nbytes * share, progress=progress, journal=journal).tensors


def _gains(calibration: AnyCalibration, calibrated: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether results are closer to the dense model's with `calibrated` weights than with `plain` ones.

    Of docstrings of Python's library, which are not the texts that were calibrated on.
    """
    from .corpus import held_out

    texts = held_out(_CHECK_TEXTS)
    return not texts or calibration.loss(calibrated, texts) <= calibration.loss(plain, texts)


def _packages() -> list[Path]:
    """Folders of the code that makes the bytes; the second lies in the first where both are installed."""
    return [Path(__file__).parents[1], Path(dispatch.CPU.module("isa").__file__).parent]


def _code_digest(packages: Iterable[Path]) -> str:
    """Of the names and bytes of all Python files, each once."""
    names: dict[Path, str] = {}
    for package in packages:
        for file in package.rglob("*.py"):
            names.setdefault(file, f"{package.name}/{file.relative_to(package).as_posix()}")
    return digest(
        part for name, file in sorted((n, f) for f, n in names.items()) for part in (name, file.read_bytes())
    )


def _journal(
    opened: Source,
    out: Path,
    texts: Sequence[str] | AnyCalibration,
    options: tuple[Any, ...],
    resume: bool,
    stack: ExitStack,
) -> NoJournal:
    """Where a calibrated run keeps what is finished; nowhere if another process does for the same output."""
    from .. import __version__

    place = output.destination(out)
    if isinstance(texts, str) or not isinstance(texts, Sequence) or place.through:
        if resume:
            raise ValueError("resume= goes with texts to calibrate on, and an output file")
        return NoJournal()

    def model_parts() -> Iterator[bytes | str | memoryview]:
        yield dump_json(opened.config)
        yield b"" if opened.tokenizer is None else opened.tokenizer.tobytes()
        for name in sorted(opened.files):  # one array at a time: those of a GGUF file are decoded
            array = opened.files[name].array(name)
            yield f"{name} {array.dtype} {array.shape}"
            yield array.reshape(-1).view(np.uint8).data

    isa = dispatch.CPU.module("isa").active()
    identity = {
        "model": digest(model_parts()),
        "texts": digest(texts),
        "ratio, transform or block": list(options),
        "version": {
            "rbe_gpu": __version__,
            # checkouts have one version number; other code may name weights differently, or make other bytes
            "code": _code_digest(_packages()),
            **{name: version(name) for name in ("numpy", "numba", "zstandard")},
        },
        "number of threads": get_num_threads(),
        "processor": [isa.cpu, *sorted(isa.features)],
    }
    try:
        return stack.enter_context(Journal(place.path, identity, resume))
    except BlockingIOError:
        if resume:
            raise
        return NoJournal()


def _check_target(options: Mapping[str, Any], block: int | None) -> None:
    """Check that there is one valid target, before any file is opened."""
    targets = [k for k in ("grade", "ratio", "rmse", "density") if options[k] is not None]
    if len(targets) > 1:
        raise ValueError(f"{' and '.join(targets)} are both given; give one target")
    if not targets and options["codes"] is None:
        raise ValueError("no target; give grade=, ratio=, rmse= or density=, or codes= alone")
    grade, ratio = options["grade"], options["ratio"]
    if grade is not None and grade not in GRADES:
        raise ValueError(f"unknown grade {grade!r}; use one of {', '.join(GRADES)}")
    if ratio is not None and not 0.0 < ratio < float("inf"):
        raise ValueError(f"ratio={ratio} is not a positive number")
    if block is not None and block not in transforms.BLOCK_SIZES:
        raise ValueError(f"block={block} is not supported; use one of {transforms.BLOCK_SIZES}")


def _made_from(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    from .. import __version__

    return {
        "name": source.path.resolve().name,
        "bytes": source.nbytes,
        # the key "kept" is that of the format's first files, whose bytes stay as they are (tests/golden_files.json)
        "target": {k.replace("density", "kept"): v for k, v in options.items() if v is not None},
        "rbe_gpu": __version__,
    }


def _row(name: str, value: RBEBlocks | NDArray[Any], error: float) -> TensorRow:
    if isinstance(value, RBEBlocks):
        shape, kind, codes, dense = value.shape, value.kind, value.codes.name, value.dense_nbytes
        return TensorRow(name, shape, kind, codes, value.nbytes, dense, error)
    dense = 4 * value.size if value.dtype == np.float32 else 0
    return TensorRow(name, value.shape, "dense", str(value.dtype), value.nbytes, dense, 0.0)
