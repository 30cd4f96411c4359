"""Record what sentence-transformers computes: `python -m tests.architectures.record_embedders`, as `record.py`.

Writes `embedder_vectors.npz`: the shapes of each model's tensors, and of `TEXTS` the hidden states of transformers
and the vectors of sentence-transformers, computed in float64.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel

from .embedder_cases import CASES, TEXTS, config, write


def main() -> None:
    recorded = {}
    with tempfile.TemporaryDirectory() as root:
        for i, (name, case) in enumerate(CASES.items()):
            made = config(case)
            options = {key: value for key, value in made.items() if key != "model_type"}
            model = AutoModel.from_config(AutoConfig.for_model(made["model_type"], **options))
            shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
            folder = write(Path(root, str(i)), case, shapes)
            embedder = SentenceTransformer(
                str(folder),
                device="cpu",
                local_files_only=True,
                model_kwargs={"attn_implementation": "eager"},
            ).double()
            # text by text: with a window, a token of padding that sees only padding gives NaN
            vectors = embedder.encode(list(TEXTS), batch_size=1, **case.call)
            recorded[f"{name}.vectors"] = np.asarray(vectors, np.float32)
            model = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
            states = []
            for text in TEXTS:
                ids = torch.tensor([embedder.tokenizer(text, truncation=True, max_length=60)["input_ids"]])
                with torch.no_grad():
                    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
                # the last of hidden_states is that before the last norm in some models
                states.append(torch.cat([*out.hidden_states[:-1], out.last_hidden_state]))
            recorded[f"{name}.states"] = torch.cat(states, dim=1).numpy().astype(np.float32)
            recorded[f"{name}.shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(Path(__file__).with_name("embedder_vectors.npz"), **recorded)


if __name__ == "__main__":
    main()
