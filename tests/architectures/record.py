"""Record what transformers computes: `python tests/architectures/record.py`, with transformers 5.24 and PyTorch 2.13.

Writes `states.npz`: the shapes of each model's tensors, its last hidden states, computed in float64, and the ids of
RobertaTokenizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from cases import (
    CONFIGS,
    LENGTHS,
    TEXTS,
    bytes_tokenizer,
    inputs,
    tokenizer_config,
    weights,
)


def main() -> None:
    ids, recorded = inputs(), {}
    for name, config in CONFIGS.items():
        options = {key: value for key, value in config.items() if key != "model_type"}
        model = AutoModel.from_config(
            AutoConfig.for_model(config["model_type"], **options), attn_implementation="eager"
        ).double()
        parameters = dict(model.named_parameters())
        shapes = {key: tuple(value.shape) for key, value in parameters.items()}
        with torch.no_grad():
            for key, values in weights(shapes).items():
                parameters[key].copy_(torch.from_numpy(values))
            states = []
            for row, length in zip(ids, LENGTHS.tolist(), strict=True):  # without padding: it may be any id
                text = torch.from_numpy(row[None, :length])
                states.append(
                    model.eval()(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state[0]
                )
        recorded[f"{name}.states"] = torch.cat(states).numpy().astype(np.float32)
        recorded[f"{name}.shapes"] = np.array(json.dumps(shapes))
    for prefix_space in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            for name, value in (
                ("config.json", {"model_type": "roberta"}),
                ("tokenizer.json", bytes_tokenizer(prefix_space)),
                ("tokenizer_config.json", tokenizer_config(prefix_space)),
            ):
                Path(folder, name).write_text(json.dumps(value))
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert type(tokenizer).__name__ == "RobertaTokenizer"
            recorded[f"tokenizer.{prefix_space}"] = np.array(json.dumps(tokenizer(list(TEXTS))["input_ids"]))
    np.savez_compressed(Path(__file__).with_name("states.npz"), **recorded)


if __name__ == "__main__":
    main()
