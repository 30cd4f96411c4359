"""Quality per byte: our files, calibrated and plain, beside the quantisers that people use, on one model and text.

Every figure is of held-out text: how near the sentence vectors are to the dense model's, and whether the first
paragraph of a docstring still finds the rest of it (`rbe_gpu.evaluate`). Bytes are all bytes that are stored. Two
comparisons: the linear layers alone, all else dense, by bits per weight; and the whole file. Recall is measured of
whole files; of the other tools' of one setting near 8, 4, 3 and 2 bits each (it takes a minute and a half).

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

import numpy as np

import rbe_gpu as rbe
from rbe_gpu.blocks import RBEBlocks
from rbe_gpu.container import load_file
from rbe_gpu.evaluate import agreement, retrieval
from rbe_gpu.models import corpus
from rbe_gpu.models.bert import BertEncoder
from rbe_gpu.models.calibrate import Calibration
from rbe_gpu.models.load import load as load_model

from .bench import Row, Session, append_rows, read_rows
from .peers import F32, Folder
from .quantizers import TOOLS, Encoder, Peer, Source
from .quantizers import peers as all_peers

FILE = "quality.csv"
DENSE, CALIBRATED, PLAIN = "dense", "rbe_gpu calibrated", "rbe_gpu plain"
LINEAR, WHOLE = "linear layers", "whole file"
ENCODING = "encoding"  # how long a peer took, and what its file holds
PLAIN_WHOLE = "plain, whole file"  # weight error of our plain files
REFUSED = "refused"  # a metric: no file of that ratio can be made; the row's shape says why
LOWER = "use a lower ratio"  # how the encoder ends its refusal of a ratio
BITS = (1.6, 2.2, 3.25, 4.25, 5.5, 7.0)  # bits per weight of the linear layers
RATIOS = (4, 8, 12, 16, 50, 200)
#: (transform, block): each of them calibrated, linear layers alone, at ABLATION_BITS
ABLATION = (
    ("none", 64), ("dct", 32), ("dct", 64), ("dct", 128), ("dwt-db2", 64), ("hadamard", 64),
)  # fmt: skip
ABLATION_BITS = 2.2
#: the same without calibration, with and without basis, at equal bytes: relative error of the weights
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
    """What is measured and calibrated on. No docstring is on both sides."""

    held_out: list[str]
    calibration: list[str]
    queries: list[str]
    documents: list[str]
    answers: list[int]

    @classmethod
    def here(cls, count: int | None = None) -> Texts:
        """Those of the report; `count` documents and as many texts make a smaller one."""
        queries, documents, answers = corpus.retrieval(documents=count)
        return cls(
            corpus.held_out(count or EVALUATION_TEXTS),
            corpus.calibration(count or CALIBRATION_TEXTS),
            list(queries),
            list(documents),
            list(answers),
        )


class Judge:
    """Scores encoders against the dense model on the same texts."""

    def __init__(self, dense: Encoder, texts: Texts) -> None:
        self.texts = texts
        self.vectors = dense.embed(texts.held_out)

    def near(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """How near its vectors are to the dense model's."""
        found = agreement(self.vectors, encoder.embed(self.texts.held_out))
        yield from ((metric, float(getattr(found, metric))) for metric in METRICS)

    def finds(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Whether its queries find their documents."""
        queries, documents = encoder.embed(self.texts.queries), encoder.embed(self.texts.documents)
        found = retrieval(queries, documents, self.texts.answers)
        yield from ((metric, float(getattr(found, metric))) for metric in RECALLS)


class Measuring:
    """Rows of one run: written at once, and not measured again where they are there already."""

    def __init__(
        self, path: Path, session: Session, resume: bool, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.path, self.session, self.say = path, session, say
        if not resume:
            path.unlink(missing_ok=True)
        self.rows = read_rows(path) if path.exists() else []
        self._done = {(r.op, r.case, r.provider) for r in self.rows}

    def has(self, op: str, case: str, provider: str) -> bool:
        """Whether this was measured; else what is measured next is said."""
        if (op, case, provider) in self._done:
            return True
        self.say(f"{case}: {provider}")
        return False

    def keep(
        self,
        op: str,
        case: str,
        provider: str,
        values: Iterable[tuple[str, float]],
        shape: str = "",
        tool: str = "",
    ) -> None:
        """Write rows, all of a provider together: a run that is stopped leaves none half measured.

        tool : name and version of the tool that was measured, to stand among the versions
        """
        session = replace(self.session, versions=f"{self.session.versions}, {tool}") if tool else self.session
        rows: list[Row] = [
            session.row(op, case, provider, metric, _UNITS.get(metric, ""), value, shape=shape)
            for metric, value in values
        ]
        append_rows(self.path, rows)
        self.rows += rows
        self._done.add((op, case, provider))


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
    resume : keep the rows that are in `path`, and go on after them
    say : told what is measured next

    Raises
    ------
    ValueError : the rows that are to be kept are of other texts or of another model
    """
    texts = Texts.here() if texts is None else texts
    m = Measuring(path, session, resume, say)
    shape = f"{len(texts.held_out)} texts, {len(texts.queries)} queries, {len(texts.documents)} documents"
    size = float((folder / "model.safetensors").stat().st_size)
    _check_same(m, shape, size)
    source = Source(folder)
    dense = load_model(folder)
    judge = Judge(dense, texts)
    if not m.has("quality", WHOLE, DENSE):
        scores = [*judge.near(dense), *judge.finds(dense)]
        m.keep(
            "quality",
            WHOLE,
            DENSE,
            [("bytes", size), ("resident_bytes", float(dense.nbytes)), *scores],
            shape,
        )
    _ours_linear(m, source, dense, judge, texts, bits, shape)
    _ours_whole(m, folder, dense, judge, texts, ratios, shape)
    _plain_ablation(m, source)
    _ablation(m, source, dense, judge, texts, ablation, shape)
    _peers(m, folder, judge, tools, shape)
    return m.rows


def _check_same(m: Measuring, shape: str, size: float) -> None:
    """Rows of other texts, or of another model, are no part of this run."""
    for r in m.rows:
        if (r.op, r.metric) == ("quality", "cosine_mean") and r.shape != shape:
            raise ValueError(f"{m.path} has rows of {r.shape}, not of {shape}; start anew")
        if (r.case, r.provider, r.metric) == (WHOLE, DENSE, "bytes") and r.p50 != size:
            raise ValueError(f"{m.path} has rows of a model of {r.p50:.0f} bytes, not {size:.0f}; start anew")


def _stored(tensors: Iterable[Any]) -> tuple[float, float]:
    """Bytes of the compressed tensors: in a file, in memory."""
    blocks = [t for t in tensors if isinstance(t, RBEBlocks)]
    return float(sum(t.nbytes for t in blocks)), float(sum(t.resident_nbytes for t in blocks))


def _ours_linear(
    m: Measuring,
    source: Source,
    dense: BertEncoder,
    judge: Judge,
    texts: Texts,
    bits: Sequence[float],
    shape: str,
) -> None:
    calibration: Calibration | None = None
    for target in bits:
        provider = f"{CALIBRATED} {target:g} bits"
        if m.has("quality", LINEAR, provider):
            continue
        calibration = calibration or rbe.calibrate(dense, texts.calibration, tables=False)
        start = time.perf_counter()
        found = calibration.compress(target * source.weights / 8)
        seconds = time.perf_counter() - start
        stored, resident = _stored(found.tensors.values())
        model = source.encoder(found.tensors)
        values = [
            ("bytes", stored), ("resident_bytes", resident), ("bits_per_weight", 8 * stored / source.weights),
            ("encode_time", seconds), *judge.near(model),
        ]  # fmt: skip
        m.keep("quality", LINEAR, provider, values, shape)


def _ours_whole(
    m: Measuring,
    folder: Path,
    dense: BertEncoder,
    judge: Judge,
    texts: Texts,
    ratios: Sequence[float],
    shape: str,
) -> None:
    calibration: Calibration | None = None
    for ratio in ratios:
        for kind in (CALIBRATED, PLAIN):
            provider = f"{kind} ratio {ratio:g}"
            erring = kind == PLAIN and not m.has("ablation", PLAIN_WHOLE, f"ratio {ratio:g}")
            known = m.has("quality", WHOLE, provider)
            if known and not erring:
                continue
            if kind == CALIBRATED and calibration is None:
                start = time.perf_counter()
                calibration = rbe.calibrate(dense, texts.calibration)
                if not m.has("quality", "calibration", CALIBRATED):
                    m.keep(
                        "quality", "calibration", CALIBRATED, [("encode_time", time.perf_counter() - start)],
                        f"{len(texts.calibration)} texts",
                    )  # fmt: skip
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / "model.rbe.safetensors"
                start = time.perf_counter()
                try:
                    rbe.compress_model(
                        folder, file, ratio=ratio, calibrate=calibration if kind == CALIBRATED else None
                    )
                except ValueError as error:
                    if LOWER not in str(error):
                        raise
                    reason = " ".join(str(error).split()).replace(f"{folder}/", "")
                    m.keep("quality", WHOLE, provider, [(REFUSED, 1.0)], reason)
                    continue
                seconds = time.perf_counter() - start
                if erring:
                    m.keep("ablation", PLAIN_WHOLE, f"ratio {ratio:g}", _weight_error(file, folder))
                if known:
                    continue
                model = load_model(file)
                size = float(file.stat().st_size)
                values = [
                    ("bytes", size), ("resident_bytes", float(model.nbytes)), ("encode_time", seconds),
                    *judge.near(model), *(judge.finds(model) if kind == CALIBRATED else ()),
                ]  # fmt: skip
                m.keep("quality", WHOLE, provider, values, shape)


def _weight_error(file: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Bytes, bits and relative error of the weights that a file holds compressed, all of them together."""
    tensors, _ = load_file(file)
    dense = Folder(folder)
    lost = energy = 0.0
    stored, count = 0, 0
    for name, packed in tensors.items():
        if isinstance(packed, RBEBlocks):
            w = dense.tensor(name)
            norm = float(np.linalg.norm(w.astype(np.float64))) ** 2
            lost += packed.error_report(w).relative_error ** 2 * norm
            energy += norm
            stored += packed.nbytes
            count += w.size
    yield "bytes", float(stored)
    yield "bits_per_weight", 8 * stored / count
    yield "weight_error", float(np.sqrt(lost / energy))


# --- what the transform, the block and the basis give ---------------------------------------------------------


def _ablation(
    m: Measuring,
    source: Source,
    dense: BertEncoder,
    judge: Judge,
    texts: Texts,
    choices: Sequence[tuple[str, int]],
    shape: str,
) -> None:
    for transform, block in choices:
        provider = f"{transform}, block {block}"
        if m.has("ablation", "calibrated", provider):
            continue
        calibration = rbe.calibrate(dense, texts.calibration, tables=False, transform=transform, block=block)
        found = calibration.compress(ABLATION_BITS * source.weights / 8)
        stored, _ = _stored(found.tensors.values())
        values = [
            ("bytes", stored), ("bits_per_weight", 8 * stored / source.weights),
            *judge.near(source.encoder(found.tensors)),
        ]  # fmt: skip
        m.keep("ablation", "calibrated", provider, values, shape)


def _groups(source: Source) -> dict[str, list[tuple[str, F32]]]:
    """The compressible weights by what they do."""
    groups: dict[str, list[tuple[str, F32]]] = {
        "word embeddings": [], "position embeddings": [], "attention": [], "feed-forward": [],
    }  # fmt: skip
    for name, values in source.tensors.items():
        if name.startswith("embeddings.word"):
            groups["word embeddings"].append((name, values))
        elif name.startswith("embeddings.position"):
            groups["position embeddings"].append((name, values))
        elif name in source.linears:
            groups["attention" if ".attention." in name else "feed-forward"].append((name, values))
    return groups


def _plain_ablation(m: Measuring, source: Source) -> None:
    """Relative error of the weights at equal bytes, by transform, with and without basis parameters."""
    for group, weights in _groups(source).items():
        kind = "vectors" if "embeddings" in group else "matrix"
        for transform in PLAIN_TRANSFORMS:
            for basis in (False, True):
                provider = f"{transform}, {'basis' if basis else 'no basis'}"
                if m.has("ablation", f"plain, {group}", provider):
                    continue
                lost = energy = stored = 0.0
                for _, w in weights:
                    packed = rbe.compress(w, ratio=PLAIN_RATIO, transform=transform, basis=basis, kind=kind)
                    norm = float(np.linalg.norm(w.astype(np.float64))) ** 2
                    lost += packed.error_report(w).relative_error ** 2 * norm
                    energy += norm
                    stored += packed.nbytes
                count = sum(w.size for _, w in weights)
                values = [
                    ("bytes", stored), ("bits_per_weight", 8 * stored / count),
                    ("weight_error", float(np.sqrt(lost / energy))),
                ]  # fmt: skip
                m.keep("ablation", f"plain, {group}", provider, values)


# --- the others -----------------------------------------------------------------------------------------------


def _peers(m: Measuring, folder: Path, judge: Judge, tools: Sequence[str] | None, shape: str) -> None:
    for tool in TOOLS if tools is None else [t for t in TOOLS if t.name in tools]:
        if tool.absent:
            m.say(f"{tool.name} is not installed (pip install {tool.requirement})")
            continue
        for peer in all_peers(folder, [tool.name]):
            _peer(m, judge, peer, shape)


def _peer(m: Measuring, judge: Judge, peer: Peer, shape: str) -> None:
    """A peer's linear layers alone, where it has them apart, and its whole file."""
    tool = f"{peer.tool} {peer.version}"
    if not m.has("quality", ENCODING, peer.name):
        took = [("encode_time", peer.seconds), ("tokenizer_bytes", float(peer.tokenizer_bytes))]
        m.keep("quality", ENCODING, peer.name, took, peer.note, tool)
    if not m.has("quality", WHOLE, peer.name):
        scores = [*judge.near(peer.whole), *(judge.finds(peer.whole) if peer.name in RECALL_OF else ())]
        m.keep("quality", WHOLE, peer.name, [("bytes", float(peer.file_bytes)), *scores], shape, tool)
    if peer.linear is not None and not m.has("quality", LINEAR, peer.name):
        size = [("bytes", float(peer.linear_bytes)), ("bits_per_weight", peer.bits_per_weight)]
        m.keep("quality", LINEAR, peer.name, [*size, *judge.near(peer.linear)], shape, tool)


def best_below(rows: Iterable[Row], case: str, size: float) -> str | None:
    """Our calibrated point of most bytes that are no more than `size`; None where all have more."""
    ours = [
        (r.p50, r.provider)
        for r in rows
        if (r.op, r.case, r.metric) == ("quality", case, "bytes")
        and r.provider.startswith(CALIBRATED)
        and r.p50 <= size
    ]
    return max(ours)[1] if ours else None


__all__ = [
    "BITS",
    "CALIBRATED",
    "DENSE",
    "ENCODING",
    "FILE",
    "LINEAR",
    "PLAIN",
    "PLAIN_WHOLE",
    "RATIOS",
    "REFUSED",
    "WHOLE",
    "best_below",
    "measure",
]
