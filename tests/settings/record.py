"""Record what sentence-transformers computes for the folders of `cases.py`: python tests/settings/record.py MODEL_DIR

In an environment of its own, with sentence-transformers installed; the test reads `vectors.npz` and needs none.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, TEXTS, make


def main(model: Path) -> None:
    import sentence_transformers
    import torch
    import transformers

    recorded = {}
    with tempfile.TemporaryDirectory() as root:
        for number, (name, case) in enumerate(CASES.items()):
            folder = make(Path(root, str(number)), model, case.edits)
            encoder = sentence_transformers.SentenceTransformer(
                str(folder), device="cpu", local_files_only=True
            )
            recorded[name] = encoder.encode(list(TEXTS), **case.call)
            assert recorded[name].dtype == np.float32
    versions = [f"{m.__name__} {m.__version__}" for m in (sentence_transformers, transformers, torch)]
    np.savez(Path(__file__).with_name("vectors.npz"), versions=np.array(versions), **recorded)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
