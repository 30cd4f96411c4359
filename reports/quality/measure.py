"""Measure quality per byte: our files, calibrated and plain, and the quantisers that people use.

All on one model and held-out text: how close the sentence vectors are to the dense model's, and whether the first
paragraph of a docstring still finds the rest of it (`rbe_gpu.evaluate`). Bytes are all bytes that are stored. Two
comparisons: the linear layers alone, all else dense, by bits per weight; and the whole file. Recall is measured for
whole files; of the other tools', for one setting near 8, 4, 3 and 2 bits each (it takes a minute and a half).

A run takes the better part of an hour on two cores, so rows are written as they are measured, and `resume` goes on
where a run was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.evaluate import agreement, retrieval
from rbe_gpu.models import corpus
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.calibrate import Calibration
from rbe_gpu.models.load import load_encoder as load_model

from ..harness.baselines import F32, Folder
from ..harness.rows import Row, Session, append_rows, read_rows
from ..harness.weight_error import file_weight_error, weight_error
from .quantizers import TOOLS, Baseline, Encoder, Source, baselines

FILE = "quality.csv"
DENSE = "dense"
CALIBRATED, PLAIN, DISTILLED = "rbe_gpu calibrated", "rbe_gpu plain", "rbe_gpu distilled"
LINEAR, WHOLE = "linear layers", "whole file"
ENCODING = "encoding"  # how long a baseline took, and what its file holds
PLAIN_WHOLE = "plain, whole file"  # weight error of our plain files
REFUSED = "refused"  # a metric: no file of that ratio can be made; the row's shape says why
LOWER = "use a lower ratio"  # the end of the encoder's refusal of a ratio
BITS = (1.6, 2.2, 3.25, 4.25, 5.5, 7.0)  # bits per weight of the linear layers
RATIOS = (4, 8, 12, 16, 50, 200)
#: (transform, block): each of them calibrated, linear layers alone, at ABLATION_BITS
ABLATION = (
    ("none", 64), ("dct", 32), ("dct", 64), ("dct", 128), ("dwt-db2", 64), ("hadamard", 64),
)  # fmt: skip
ABLATION_BITS = 2.2
#: without calibration, with and without basis, at equal bytes: relative error of the weights
PLAIN_TRANSFORMS = ("none", "dct", "dwt-db2", "dwt-haar", "hadamard")
PLAIN_RATIO = 8
RECALL_OF = frozenset(
    {
        *(f"gguf {t}" for t in ("Q8_0", "Q5_0", "Q4_0")),
        *(f"llama.cpp {t}" for t in ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_M")),
        *(f"bitsandbytes {t} + words" for t in ("int8", "nf4 double")),
        *(f"hqq {t}, groups of 64 + words" for t in ("4 bits", "3 bits")),
        *(f"optimum-quanto {t} hqq + words" for t in ("qint4", "qint2")),
        "torchao int4 hqq, groups of 64 + words",
        *(f"onnxruntime {t} + words" for t in ("dynamic int8 per channel", "4 bits, blocks of 64")),
    }
)
EVALUATION_TEXTS, CALIBRATION_TEXTS = 512, 768
METRICS = ("cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10")
RECALLS = ("recall_at_1", "recall_at_10")


@dataclass(frozen=True)
class Texts:
    """The texts to evaluate and to calibrate on. No docstring is on both sides."""

    held_out: list[str]
    calibration: list[str]
    queries: list[str]
    documents: list[str]
    answers: list[int]

    @classmethod
    def here(cls, count: int | None = None) -> Texts:
        """The texts of the report; of a smaller one, `count` documents and as many texts."""
        queries, documents, answers = corpus.retrieval(documents=count)
        return cls(
            corpus.held_out(count or EVALUATION_TEXTS),
            corpus.calibration(count or CALIBRATION_TEXTS),
            list(queries),
            list(documents),
            list(answers),
        )


class Evaluator:
    """Scores encoders against the dense model on the same texts."""

    def __init__(self, dense: Encoder, texts: Texts) -> None:
        self.texts = texts
        self.vectors = dense.embed(texts.held_out)

    def closeness(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """How close its vectors are to the dense model's."""
        scores = agreement(self.vectors, encoder.embed(self.texts.held_out))
        yield from ((metric, float(getattr(scores, metric))) for metric in METRICS)

    def recall(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """How many of its queries find their documents."""
        queries, documents = encoder.embed(self.texts.queries), encoder.embed(self.texts.documents)
        scores = retrieval(queries, documents, self.texts.answers)
        yield from ((metric, float(getattr(scores, metric))) for metric in RECALLS)


class Run:
    """One run: its rows are written at once, and not measured again where they are there already. Without `resume`
    a file that is there is moved to `path` + ".old".

    Attributes
    ----------
    shape : how many texts, queries and documents the scores are of: the shape of their rows
    """

    def __init__(
        self,
        path: Path,
        session: Session,
        shape: str,
        resume: bool,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path, self.session, self.shape, self.say = path, session, shape, say
        if path.exists() and not resume:
            old = path.replace(path.with_name(f"{path.name}.old"))
            say(f"the rows of an earlier run are now in {old}")
        self.rows = read_rows(path) if path.exists() else []
        self._done = {(r.op, r.case, r.provider) for r in self.rows}

    def done(self, op: str, case: str, provider: str) -> bool:
        """Whether this was measured."""
        return (op, case, provider) in self._done

    def has(self, op: str, case: str, provider: str) -> bool:
        """Whether this was measured; if not, announce it as the next measurement."""
        if self.done(op, case, provider):
            return True
        self.say(f"{case}: {provider}")
        return False

    def keep(
        self,
        op: str,
        case: str,
        provider: str,
        values: Iterable[tuple[str, float]],
        shape: str | None = None,
        tool: str = "",
    ) -> None:
        """Write rows, all of a provider together: a run that is stopped leaves none half measured.

        shape : default: that of the run
        tool : name and version of the tool that was measured, added to the versions
        """  # fmt: skip
        session = replace(self.session, versions=f"{self.session.versions}, {tool}") if tool else self.session
        rows = [
            session.row(
                op,
                case,
                provider,
                metric,
                _UNITS.get(metric, ""),
                value,
                shape=self.shape if shape is None else shape,
            )
            for metric, value in values
        ]
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows that were made elsewhere."""
        rows = list(rows)
        append_rows(self.path, rows)
        self.rows += rows
        self._done |= {(r.op, r.case, r.provider) for r in rows}


_UNITS = {
    "bytes": "B",
    "resident_bytes": "B",
    "bits_per_weight": "bit",
    "encode_time": "s",
    "tokenizer_bytes": "B",
}


def measure(
    folder: Path,
    path: Path,
    session: Session,
    *,
    texts: Texts | None = None,
    bits: Sequence[float] = BITS,
    ratios: Sequence[float] = RATIOS,
    tools: Sequence[str] | None = None,
    ablation: Sequence[tuple[str, int]] = ABLATION,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure all, and write the rows to `path` as they come.

    Parameters
    ----------
    folder : the dense model
    bits, ratios : our points: of the linear layers, of the whole file
    tools : which quantisers to compare with; default: all that are installed
    ablation : (transform, block) that calibration is tried with
    resume : keep the rows that are in `path`, and continue after them
    say : called with what is measured next

    Raises
    ------
    ValueError
        The rows to resume from are of other texts or of another model.
    """
    texts = Texts.here() if texts is None else texts
    shape = f"{len(texts.held_out)} texts, {len(texts.queries)} queries, {len(texts.documents)} documents"
    run = Run(path, session, shape, resume, say)
    size = float((folder / "model.safetensors").stat().st_size)
    check_same(run, size)
    source, dense = Source(folder), load_model(folder)
    evaluator = Evaluator(dense, texts)
    if not run.has("quality", WHOLE, DENSE):
        scores = [*evaluator.closeness(dense), *evaluator.recall(dense)]
        run.keep("quality", WHOLE, DENSE, [("bytes", size), ("resident_bytes", float(dense.nbytes)), *scores])
    calibrated = _Calibrated(dense, texts, source, evaluator)
    _our_linear_layers(run, calibrated, bits)
    _our_files(run, folder, calibrated, ratios)
    _plain_ablation(run, source)
    for transform, block in ablation:
        provider = f"{transform}, block {block}"
        if not run.has("ablation", "calibrated", provider):
            calibration = calibrated.calibration(transform=transform, block=block)
            values = calibrated.linear_layers(calibration, ABLATION_BITS)
            run.keep("ablation", "calibrated", provider, [v for v in values if v[0] not in _NOT_OF_ABLATION])
    for tool in TOOLS if tools is None else [t for t in TOOLS if t.name in tools]:
        if tool.absent:
            say(f"{tool.name} is not installed (pip install {tool.requirement})")
            continue
        for baseline in baselines(folder, [tool.name]):
            _baseline(run, evaluator, baseline)
    return run.rows


def check_same(run: Run, size: float) -> None:
    """Check that the rows that a run resumes from are of its texts and its model.

    size : bytes of the dense model's row

    Raises
    ------
    ValueError
        They are not.
    """
    for r in run.rows:
        if (r.op, r.metric) == ("quality", "cosine_mean") and r.shape != run.shape:
            raise ValueError(f"{run.path} has rows of {r.shape}, not of {run.shape}; start anew")
        if (r.case, r.provider, r.metric) == (WHOLE, DENSE, "bytes") and r.p50 != size:
            raise ValueError(
                f"{run.path} has rows of a model of {r.p50:.0f} bytes, not {size:.0f}; start anew"
            )


# --- ours -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calibrated:
    """Calibrations of the dense model, and our linear layers made with them."""

    dense: BertEncoder
    texts: Texts
    source: Source
    evaluator: Evaluator

    def calibration(self, **options: Any) -> Calibration:
        """Of the linear layers alone."""
        made: Calibration = rbe.calibrate(self.dense, self.texts.calibration, tables=False, **options)
        return made

    def linear_layers(self, calibration: Calibration, bits: float) -> list[tuple[str, float]]:
        """Sizes and scores of the linear layers at so many bits per weight, all else dense."""
        start = time.perf_counter()
        encoded = calibration.compress(bits * self.source.weights / 8)
        seconds = time.perf_counter() - start
        blocks = [t for t in encoded.tensors.values() if isinstance(t, RBEBlocks)]
        stored = float(sum(t.nbytes for t in blocks))
        return [
            ("bytes", stored), ("resident_bytes", float(sum(t.resident_nbytes for t in blocks))),
            ("bits_per_weight", 8 * stored / self.source.weights), ("encode_time", seconds),
            *self.evaluator.closeness(self.source.encoder(encoded.tensors)),
        ]  # fmt: skip


_NOT_OF_ABLATION = ("resident_bytes", "encode_time")


def _our_linear_layers(run: Run, calibrated: _Calibrated, bits: Sequence[float]) -> None:
    calibration: Calibration | None = None
    for target in bits:
        provider = f"{CALIBRATED} {target:g} bits"
        if not run.has("quality", LINEAR, provider):
            calibration = calibration or calibrated.calibration()
            run.keep("quality", LINEAR, provider, calibrated.linear_layers(calibration, target))


def _our_files(run: Run, folder: Path, calibrated: _Calibrated, ratios: Sequence[float]) -> None:
    calibration: Calibration | None = None
    evaluator, texts = calibrated.evaluator, calibrated.texts
    for ratio in ratios:
        for prefix in (CALIBRATED, PLAIN):
            provider, error_of = f"{prefix} ratio {ratio:g}", f"ratio {ratio:g}"
            needs_error = prefix == PLAIN and not run.has("ablation", PLAIN_WHOLE, error_of)
            done = run.has("quality", WHOLE, provider)
            if done and not needs_error:
                continue
            if prefix == CALIBRATED and calibration is None:
                start = time.perf_counter()
                calibration = rbe.calibrate(calibrated.dense, texts.calibration)
                took = [("encode_time", time.perf_counter() - start)]
                if not run.has("quality", "calibration", CALIBRATED):
                    run.keep("quality", "calibration", CALIBRATED, took, f"{len(texts.calibration)} texts")
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / "model.rbe.safetensors"
                start = time.perf_counter()
                try:
                    rbe.compress_model(
                        folder, file, ratio=ratio, calibrate=calibration if prefix == CALIBRATED else None
                    )
                except ValueError as error:
                    if LOWER not in str(error):
                        raise
                    reason = " ".join(str(error).split()).replace(f"{folder}/", "")
                    run.keep("quality", WHOLE, provider, [(REFUSED, 1.0)], reason)
                    continue
                seconds = time.perf_counter() - start
                if needs_error:
                    errors = file_weight_error(file, Folder(folder))
                    run.keep("ablation", PLAIN_WHOLE, error_of, errors._asdict().items(), "")
                if done:
                    continue
                model = load_model(file)
                values = [
                    ("bytes", float(file.stat().st_size)), ("resident_bytes", float(model.nbytes)),
                    ("encode_time", seconds), *evaluator.closeness(model),
                    *(evaluator.recall(model) if prefix == CALIBRATED else ()),
                ]  # fmt: skip
                run.keep("quality", WHOLE, provider, values)


def _groups(source: Source) -> dict[str, list[F32]]:
    """The compressible weights by their function."""
    groups: dict[str, list[F32]] = {
        "word embeddings": [], "position embeddings": [], "attention": [], "feed-forward": [],
    }  # fmt: skip
    for name, values in source.tensors.items():
        if name.startswith("embeddings.word"):
            groups["word embeddings"].append(values)
        elif name.startswith("embeddings.position"):
            groups["position embeddings"].append(values)
        elif name in source.linears:
            groups["attention" if ".attention." in name else "feed-forward"].append(values)
    return groups


def _plain_ablation(run: Run, source: Source) -> None:
    """Relative error of the weights at equal bytes, by transform, with and without basis parameters."""
    for group, weights in _groups(source).items():
        kind = "vectors" if "embeddings" in group else "matrix"
        for transform in PLAIN_TRANSFORMS:
            for basis in (False, True):
                provider = f"{transform}, {'basis' if basis else 'no basis'}"
                if run.has("ablation", f"plain, {group}", provider):
                    continue
                errors = weight_error(
                    (rbe.compress(w, ratio=PLAIN_RATIO, transform=transform, basis=basis, kind=kind), w)
                    for w in weights
                )
                run.keep("ablation", f"plain, {group}", provider, errors._asdict().items(), "")


# --- other tools ----------------------------------------------------------------------------------------------


def _baseline(run: Run, evaluator: Evaluator, b: Baseline) -> None:
    """A baseline's linear layers alone, where it has them apart, and its whole file."""
    tool = f"{b.tool} {b.version}"
    if not run.has("quality", ENCODING, b.name):
        took = [("encode_time", b.seconds), ("tokenizer_bytes", float(b.tokenizer_bytes))]
        run.keep("quality", ENCODING, b.name, took, b.note, tool)
    if not run.has("quality", WHOLE, b.name):
        recall = evaluator.recall(b.whole) if b.name in RECALL_OF else ()
        values = [("bytes", float(b.file_bytes)), *evaluator.closeness(b.whole), *recall]
        run.keep("quality", WHOLE, b.name, values, tool=tool)
    if b.linear is not None and not run.has("quality", LINEAR, b.name):
        size = [("bytes", float(b.linear_bytes)), ("bits_per_weight", b.bits_per_weight)]
        run.keep("quality", LINEAR, b.name, [*size, *evaluator.closeness(b.linear)], tool=tool)
