"""Measure which file to take, and write the page "Small, good, fast".

    python -m rbe_gpu.reports.quality.small_good_fast MODEL_DIR FILE.rbe.safetensors... --texts TEXTS --out FOLDER

FOLDER gets small-good-fast.html, its rows (small-good-fast.csv) and plots. Rows are written as they are measured, and
--resume goes on where a run was stopped; name all files again. `python -m rbe_gpu.reports FOLDER/small-good-fast.csv
--out FOLDER` writes the page from rows alone.

Beside the files it measures the dense model, ONNX Runtime (float32, and dynamic int8), OpenVINO (float32, and int8)
and PyTorch; and, of --tool, by bytes and closeness, those that quantise weights, and model2vec's static embeddings of
as many bytes, which takes minutes to distil. Those that are not installed are named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rbe_gpu.models.locate import model_folder

from ...harness.baselines import torch_or_none
from ...harness.process import start, threads_to_use
from ...harness.rows import Session
from . import peers
from .measure import FILE, ROUNDS, WEIGHT_ONLY, measure
from .page import write

MODULE = "rbe_gpu.reports.quality.small_good_fast"
TOOLS = (*WEIGHT_ONLY, peers.STATIC)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the folder of the dense model")
    parser.add_argument("files", type=Path, nargs="+", help="files that rbe-gpu made of it")
    parser.add_argument("--texts", type=Path, required=True, help="held-out text, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the page, its rows and its plots")
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="only this one of those that --tool names"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="of timing; 0: none (default: %(default)s)"
    )
    parser.add_argument("--documents", type=int, help="how many the retrieval task searches (default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, and go on")
    parser.add_argument(
        "--threads",
        type=int,
        help="of this process, as its environment has set them; without it a process is started whose libraries all "
        "use RBE_THREADS threads (default: one for each core)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.threads is None:
            threads = threads_to_use()
            given = sys.argv[1:] if arguments is None else arguments
            return start(MODULE, [*given, "--threads", str(threads)], threads)
        _measure(options)
    except KeyboardInterrupt:
        if options.threads is None:  # the process that measures is interrupted too, and says nothing
            print(f"interrupted; the rows are in {options.out / FILE}: go on with --resume", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure(options: argparse.Namespace) -> None:
    torch = torch_or_none()
    if torch is not None:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def say(what: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - started), 60)
        print(f"{minutes:3d}:{seconds:02d}  {what}", file=sys.stderr, flush=True)

    for name in peers.absent():
        say(f"{name} is not installed and is not measured: pip install {peers.REQUIREMENTS[name]}")
    folder, texts = model_folder(options.model), options.texts.read_text("utf-8").splitlines()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(
        folder,
        options.files,
        texts,
        options.out,
        Session.here(options.threads),
        source_of_texts=options.texts.name,
        tools=options.tool or TOOLS,
        rounds=options.rounds,
        documents=options.documents,
        resume=options.resume,
        say=say,
    )
    print(f"{write(rows, options.out)} written; its rows are in {options.out / FILE}.")


if __name__ == "__main__":
    sys.exit(main())
