"""Record what transformers computes: `python tests/architectures/record_decoders.py`, as `record.py`.

Writes `decoder_states.npz`: the shapes of each decoder's tensors, its hidden states and logits, computed in float64,
and the ids of greedy generation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from cases import weights
from decoder_cases import CONFIGS, LENGTHS, NEW_TOKENS, inputs


def main() -> None:
    ids, recorded = inputs(), {}
    for name, config in CONFIGS.items():
        options = {key: value for key, value in config.items() if key != "model_type"}
        made = AutoConfig.for_model(config["model_type"], **options)
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").double().eval()
        parameters = dict(model.named_parameters())
        shapes = {key: tuple(value.shape) for key, value in parameters.items()}
        states, logits, tokens = [], [], []
        with torch.no_grad():
            for key, values in weights(shapes).items():
                parameters[key].copy_(torch.from_numpy(values))
            for row, length in zip(ids, LENGTHS.tolist(), strict=True):
                text = torch.from_numpy(row[None, :length])
                there = torch.ones_like(text)
                out = model(input_ids=text, attention_mask=there, output_hidden_states=True)
                states.append(torch.stack([s[0] for s in out.hidden_states]))
                logits.append(out.logits[0])
                # token by token without a cache: nothing but the definition
                for _ in range(NEW_TOKENS):
                    last = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]
                    text = torch.cat([text, last.argmax()[None, None]], dim=1)
                tokens.append(text[0, length:])
        recorded[f"{name}.states"] = torch.cat(states, dim=1).numpy().astype(np.float32)
        recorded[f"{name}.logits"] = torch.cat(logits).numpy().astype(np.float32)
        recorded[f"{name}.tokens"] = torch.stack(tokens).numpy().astype(np.int16)
        recorded[f"{name}.shapes"] = np.array(json.dumps(shapes))
    np.savez_compressed(Path(__file__).with_name("decoder_states.npz"), **recorded)


if __name__ == "__main__":
    main()
