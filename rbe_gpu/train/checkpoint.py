"""Checkpoints: everything that the next step of training depends on, in one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import output
from .trainer import Snapshot, Trainer


def path_for(out: Path) -> Path:
    """Where the checkpoint of an output file is: `.NAME.checkpoint` beside it."""
    return out.with_name(f".{out.name}.checkpoint")


def write(path: Path, trainer: Trainer, best: Snapshot | None, facts: Mapping[str, Any]) -> None:
    """Replace the checkpoint. `facts`: JSON values."""
    tensors = {f"state.{name}": value for name, value in trainer.state()}
    for part, values in (best._asdict() if best else {}).items():
        tensors |= {f"best.{part}.{name}": value for name, value in values.items()}
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    with output.replacing(path) as file:
        file.write(save(contiguous, {"facts": json.dumps(facts)}))


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint.

    Raises
    ------
    ValueError
        The file is no checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint ({error}); remove it, or train without resume") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is no checkpoint; remove it, or train without resume")
    return facts


def restore(path: Path, trainer: Trainer) -> Snapshot | None:
    """Set a trainer to the state of a checkpoint of the same model; its best snapshot."""
    with safe_open(path, "pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, value in trainer.state():
            if f"state.{name}" not in names:
                raise ValueError(f"{path} lacks {name}; remove it, or train without resume")
            value.copy_(file.get_tensor(f"state.{name}"))

        def part(of: str) -> dict[str, torch.Tensor]:
            start = f"best.{of}."
            return {n.removeprefix(start): file.get_tensor(n) for n in sorted(names) if n.startswith(start)}

        best = Snapshot(*(part(of) for of in Snapshot._fields))
        return best if best.latents else None
