"""Measure files of one model beside its dense form and the encoders that people run: bytes, quality, and speed.

Quality is that of `quality.measure`, on texts that the caller names: closeness of the vectors to the dense model's,
and the recall of the retrieval task. Speed is measured of all encoders together, in one process and in alternating
order: all texts in batches of 32, sorted by their tokens, and one short text at a time; tokenizers count. Tools that
quantise weights and have no encoder of their own are measured by bytes and closeness alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rbe_gpu.container import describe
from rbe_gpu.models import corpus
from rbe_gpu.models.load import load_encoder

from ...harness.measure import rate_rows
from ...harness.row_names import BATCH
from ...harness.rows import Results, Row, Session
from ...harness.timing import Calls, paired_times
from ..measure import (
    CALIBRATED,
    DENSE,
    DISTILLED,
    ENCODING,
    PLAIN,
    RECALL_OF,
    WHOLE,
    Evaluator,
    Run,
    Texts,
    check_same,
)
from ..points import tool_of
from ..quantizers import TOOLS, Encoder, Source, baselines
from . import peers

OP = "small_good_fast"
BATCHES, ONE = f"batches of {BATCH}", "one short text"
#: whom speeds are compared with
BASELINES = (DENSE, peers.ONNX)
FILE = "small-good-fast.csv"
#: the folder of the distilled static embeddings, beside the rows
STATIC_FOLDER = "model2vec"
SUFFIX = ".rbe.safetensors"
#: tools that quantise weights, one setting near 8, 4, 3 and 2 bits each (`RECALL_OF`)
WEIGHT_ONLY = ("gguf", "llama.cpp", "bitsandbytes", "hqq")
SHORT_TEXTS = 8  # the shortest of the texts, embedded one at a time
ROUNDS = 5


def provider_of(file: Path, folder: Path) -> str:
    """The provider of a file's rows: how it was made, and its name, "rbe_gpu distilled minilm-r16".

    Raises
    ------
    ValueError
        It was made from another model than the one in `folder`.
    """
    config = describe(file).config
    made: Any = config.get("source", {})
    size = (folder / "model.safetensors").stat().st_size
    if made.get("bytes", size) != size:
        raise ValueError(
            f"{file} was made from a model of {made['bytes']} bytes, and {folder} has {size}; name the model that it "
            "was made from"
        )
    # calibration measures where int8 activations lose little, and names those layers, perhaps none
    kind = DISTILLED if "distilled" in made else CALIBRATED if "int8_activations" in config else PLAIN
    return f"{kind} {file.name.removesuffix(SUFFIX)}"


def measure(
    folder: Path,
    files: Sequence[Path],
    texts: Sequence[str],
    out: Path,
    session: Session,
    *,
    source_of_texts: str,
    tools: Sequence[str] = (*WEIGHT_ONLY, peers.STATIC),
    rounds: int = ROUNDS,
    documents: int | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure all, and write the rows to `out/small-good-fast.csv` as they come.

    Parameters
    ----------
    folder : the dense model
    files : `.rbe.safetensors` files made of it
    texts : to compare vectors on, and to time; of a kind that no file was calibrated or trained on
    source_of_texts : what the rows call them
    tools : of `WEIGHT_ONLY`, and "model2vec"; those that are not installed are left out
    rounds : of timing, at least; 0: nothing is timed
    documents : how many the retrieval task searches; None: all
    resume : keep the rows that are there, and continue after them
    say : called with what is measured next

    Raises
    ------
    ValueError
        A file is of another model, two have the same name, or the rows to resume from are of other texts or of other
        files of the same name.
    """
    texts = list(texts)
    providers = {file: provider_of(file, folder) for file in files}
    if len(set(providers.values())) < len(files):
        raise ValueError(f"two files have the same name: {', '.join(map(str, files))}; rename one")
    held = Texts(texts, [], *map(list, corpus.retrieval(documents=documents)))  # type: ignore[arg-type]
    shape = f"{len(texts)} texts of {source_of_texts}, {len(held.queries)} queries, {len(held.documents)} documents"
    run = Run(out / FILE, session, shape, resume, say)
    source, dense = Source(folder), load_encoder(folder)
    check_same(run, float(peers.dense_bytes(source)))
    evaluator = Evaluator(dense, held)
    timed: dict[str, Encoder] = {DENSE: dense}
    _keep(run, evaluator, DENSE, peers.dense_bytes(source), dense, resident=dense.nbytes)
    for file, provider in providers.items():
        if Results(run.rows).value("quality", WHOLE, provider, "bytes") not in (None, file.stat().st_size):
            raise ValueError(
                f"{run.path} has rows of another file called {file.name}; start anew, or rename it"
            )
        timed[provider] = model = load_encoder(file)
        _keep(run, evaluator, provider, file.stat().st_size, model, resident=model.nbytes)
        _keep_training(run, provider, file)
    for peer in peers.transformers(source, session.threads):
        timed[peer.name] = peer.encoder
        _keep(run, evaluator, peer.name, peer.nbytes, peer.encoder, tool=peer.tool)
    if peers.STATIC in tools and peers.STATIC not in peers.absent():
        for peer in _static(folder, out / STATIC_FOLDER, files, say):
            timed[peer.name] = peer.encoder
            _keep(run, evaluator, peer.name, peer.nbytes, peer.encoder, tool=peer.tool, same_space=False)
    _weight_only(run, evaluator, source, [t for t in tools if t != peers.STATIC])
    if rounds:
        _speeds(run, source, texts, timed, rounds)
    return run.rows


def _keep(
    run: Run,
    evaluator: Evaluator,
    provider: str,
    nbytes: int,
    encoder: Encoder,
    *,
    resident: int | None = None,
    tool: str = "",
    same_space: bool = True,
) -> None:
    """Bytes and quality of an encoder."""
    if run.has("quality", WHOLE, provider):
        return
    values = [("bytes", float(nbytes))]
    values += [] if resident is None else [("resident_bytes", float(resident))]
    values += evaluator.closeness(encoder) if same_space else ()
    run.keep("quality", WHOLE, provider, [*values, *evaluator.recall(encoder)], tool=tool)


def _keep_training(run: Run, provider: str, file: Path) -> None:
    """How long a distilled file was trained, as it says."""
    facts = describe(file).config.get("source", {}).get("distilled")
    if facts is not None and not run.has("quality", ENCODING, provider):
        words = f"the last run: {facts['steps']:,} steps on {facts['texts']:,} texts"
        run.keep("quality", ENCODING, provider, [("training_steps", float(facts["steps"]))], words)


def _static(folder: Path, at: Path, files: Sequence[Path], say: Callable[[str], None]) -> list[peers.Peer]:
    """Static embeddings of the bytes of every file; one of as many dimensions as another is left out."""
    if not at.exists():
        say(f"distil static embeddings into {at}")
        peers.distil_static(folder, at)
    made = (peers.static(at, file.stat().st_size) for file in files)
    return list({peer.name: peer for peer in made if peer is not None}.values())


def _weight_only(run: Run, evaluator: Evaluator, source: Source, tools: Sequence[str]) -> None:
    """Bytes and closeness of tools whose weights run in the dense encoder of this project."""
    for tool in (t for t in TOOLS if t.name in tools):
        if tool.absent:
            run.say(f"{tool.name} is not installed (pip install {tool.requirement})")
            continue
        names = {name for name in RECALL_OF if tool_of(name) == tool.name}
        if all(run.done("quality", WHOLE, name) for name in names):
            continue
        for b in baselines(source.folder.path, [tool.name]):
            if b.name in names and not run.has("quality", WHOLE, b.name):
                size = b.file_bytes + (0 if b.tokenizer_bytes else peers.tokenizer_bytes(source))
                values = [("bytes", float(size)), *evaluator.closeness(b.whole)]
                run.keep("quality", WHOLE, b.name, values, tool=f"{b.tool} {b.version}")


# --- speed ----------------------------------------------------------------------------------------------------


def _speeds(run: Run, source: Source, texts: Sequence[str], timed: dict[str, Encoder], rounds: int) -> None:
    """Times of all encoders; all of them anew where one has none, so that every ratio is of one run."""
    tokens = np.array([len(e.ids) for e in source.folder.tokenizer.encode_batch(list(texts))])
    order = [texts[i] for i in np.argsort(-tokens, kind="stable")]
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    short = order[-SHORT_TEXTS:]
    cases = (
        (BATCHES, batches, rounds, f"{len(order)} texts, {int(tokens.sum())} tokens"),
        (ONE, [[text] for text in short], 4 * rounds, f"{int(np.sort(tokens)[: len(short)].mean())} tokens"),
    )
    for case, parts, least, shape in cases:
        if all(run.done(OP, case, provider) for provider in timed):
            continue
        run.say(f"{case}: all of them in turn")
        calls: dict[str, Calls] = {
            name: [lambda m=m, parts=parts: [m.embed(part) for part in parts]]  # type: ignore[misc]
            for name, m in timed.items()
        }
        seconds = paired_times(calls, seconds=0, least=least)
        count = 1 if case == ONE else len(order)
        each = {name: [t * count / sum(map(len, parts)) for t in ts] for name, ts in seconds.items()}
        rows = rate_rows(
            run.session, OP, case, each, texts=count, shape=shape, baselines=dict.fromkeys(BASELINES, ())
        )
        run.add(rows)
