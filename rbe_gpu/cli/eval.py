"""`rbe-gpu eval`: the quality of a compressed model relative to the dense one."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _eval_decoders
from ._errors import about, fail, usage
from ._inputs import check_model, read_texts
from ._output import Json, escaped, new_table, print_json, progress_bar, show, size

EVALUATION_TEXTS = 512  # number of held-out docstrings
MIN_TEXTS = 11  # texts, and documents to search: each has ten others


def command(
    file: Annotated[Path, typer.Argument(readable=False, help="A .rbe.safetensors file of a model.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model: a folder or hf://OWNER/NAME. Default: the one the file was made from.",
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="A UTF-8 file, one text per line. Default: held-out docstrings of Python's library.",
        ),
    ] = None,
    retrieval: Annotated[
        bool,
        typer.Option("--retrieval/--no-retrieval", help="Also measure retrieval of docstrings."),
    ] = True,
    documents: Annotated[
        int | None,
        typer.Option(min=MIN_TEXTS, max=10**9, help="Number of documents to search. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare what a compressed model computes with what the dense model does: embeddings, or the next tokens.

    Cosine similarity and top-10 overlap compare the two models' embeddings of the same texts. In retrieval, the query
    is the first paragraph of a held-out docstring and the document to find is the rest of it, among all docstrings.
    Of decoders perplexity is measured, and how far the predicted probabilities are from the dense model's.
    """
    from ..models.architectures import is_gguf

    if documents is not None and not retrieval:
        usage("leave one of them out: documents are searched by retrieval", "--documents", "--no-retrieval")
    if not os.path.lexists(file):
        fail(f"{file} does not exist")
    if file.is_dir():
        fail(f"{file} is a folder; name a .rbe.safetensors file")
    for source in (str(file), *([] if against is None else [against])):
        check_model(source)
    dense_path = None if against is None else Path(against).expanduser()
    if dense_path is not None and dense_path.is_file() and not is_gguf(dense_path):
        fail(f"{against} is a file; --against takes the dense model: a folder or hf://OWNER/NAME")
    from ..models import corpus
    from ..models.architectures import generates
    from ..models.decoder import Decoder
    from ..models.load import load
    from ..models.locate import find_model

    lines = [] if texts is None else read_texts(texts)
    with about(file):
        model = load(file)
        source = str(source_folder(file)) if against is None else against
    with about(source):
        folder = find_model(source)
        dense = load(folder)
    if isinstance(model, Decoder) or isinstance(dense, Decoder):
        decoders = generates(model, file), generates(dense, source)
        result = _eval_decoders.evaluate(*decoders, lines, file, source)
        if as_json:
            print_json(result)
        else:
            _eval_decoders.print_result(result, "held-out docstrings" if texts is None else str(texts))
        return
    if texts is not None and len(lines) < MIN_TEXTS:
        fail(
            f"{texts}: {len(lines)} texts are too few to compare each with its 10 nearest; pass {MIN_TEXTS} or more"
        )
    from ..evaluate import evaluate

    lines = lines or corpus.held_out(EVALUATION_TEXTS)
    task = corpus.retrieval(documents=documents) if retrieval else None
    start = time.perf_counter()
    with progress_bar("evaluating") as progress, about(f"{file} and {source}"):
        evaluation = evaluate(model, dense, lines, task, progress=progress)
    seconds = time.perf_counter() - start
    sizes = {"dense": checkpoint_bytes(folder), "compressed": file.stat().st_size}
    result = {
        "file": str(file),
        "against": source,
        "texts": "docstrings" if texts is None else str(texts),
        "python": platform.python_version(),
        "seconds": seconds,
        **{
            name: {
                "file_bytes": sizes[name],
                "ratio": sizes["dense"] / sizes[name],
                "resident_bytes": encoder.nbytes,
                "cache_bytes": encoder.cache.nbytes,
                **asdict(getattr(evaluation, name)),
            }
            for name, encoder in (("dense", dense), ("compressed", model))
        },
    }
    if as_json:
        print_json(result)
    else:
        _show(result)


def source_folder(file: Path) -> Path:
    """The checkpoint that a file was made from.

    Searched beside the file, in the current folder and in the installed model package. The file stores the folder's
    name, the size of its weights and its config.json: all three must match.
    """
    from ..container import describe
    from ..models.architectures import is_gguf
    from ..models.folder import weights_folder
    from ..models.json_files import read_json
    from ..models.locate import model_folder

    config = describe(file).config
    source = config.get("source")
    name, nbytes = (source.get("name"), source.get("bytes")) if isinstance(source, dict) else (None, None)
    if not isinstance(name, str) or not name or Path(name).name != name:
        fail(f"{file} does not say what it was made from; pass the dense model with --against")
    candidates = [file.parent / name, Path(name)]
    for path in candidates:
        if path.is_file() and is_gguf(path) and path.stat().st_size == nbytes:
            return path
    with suppress(FileNotFoundError):  # the package is not installed
        candidates.append(model_folder())
    for folder in candidates:
        with suppress(FileNotFoundError):  # no folder, or one without weights
            same = read_json(weights_folder(folder) / "config.json") == config.get("config")
            if same and checkpoint_bytes(folder) == nbytes:
                return folder
    fail(
        f"the model that {file} was made from ({escaped(name)}, {nbytes} bytes) is neither beside it nor here; "
        "pass it with --against"
    )


def checkpoint_bytes(folder: Path) -> int:
    """Size of a folder's weight files: model.safetensors, or the shards that its index lists."""
    from ..models.folder import weights_folder
    from ..models.json_files import read_json

    folder = weights_folder(folder)
    single = folder / "model.safetensors"
    if single.is_file():
        return single.stat().st_size
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / 'model.safetensors.index.json'} has no weight_map")
    return sum((folder / Path(str(shard)).name).stat().st_size for shard in set(shards.values()))


def _show(result: dict[str, Any]) -> None:
    """Print one column per model and one row per metric."""
    table = new_table("", ">dense", ">compressed")
    models = (result["dense"], result["compressed"])

    def row(name: str, format: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(format(column) for column in models))

    row("file", lambda c: size(c["file_bytes"]))
    row("times smaller", lambda c: f"{c['ratio']:.2f}")
    row("weights in memory", lambda c: size(c["resident_bytes"]))
    row("cached panels", lambda c: size(c["cache_bytes"]))
    row("cosine to dense, mean", lambda c: f"{c['agreement']['cosine_mean']:.4f}")
    row("cosine to dense, 1st percentile", lambda c: f"{c['agreement']['cosine_p1']:.4f}")
    row("cosine to dense, least", lambda c: f"{c['agreement']['cosine_min']:.4f}")
    row("top-10 overlap with dense", lambda c: f"{c['agreement']['overlap_at_10']:.4f}")
    retrieval = result["dense"]["retrieval"]
    if retrieval is not None:
        row("recall@1", lambda c: f"{c['retrieval']['recall_at_1']:.4f}")
        row("recall@10", lambda c: f"{c['retrieval']['recall_at_10']:.4f}")
    texts = result["dense"]["agreement"]["texts"]
    source = "held-out docstrings" if result["texts"] == "docstrings" else result["texts"]
    queries = ""
    if retrieval is not None:
        queries = f"; {retrieval['queries']} queries among {retrieval['documents']} documents"
    show(
        table,
        f"{texts} texts ({source}){queries}; {result['seconds']:.1f} s",
        f"dense: {result['against']}",
        f"compressed: {result['file']}",
    )
