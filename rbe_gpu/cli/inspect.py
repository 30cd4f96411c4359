"""`rbe-gpu inspect`: validate a file and list its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._errors import about
from ._output import Json, escaped, new_table, print_json, show, size


def command(
    file: Annotated[Path, typer.Argument(readable=False, help="A .rbe.safetensors file.")],
    as_json: Json = False,
) -> None:
    """Validate a whole file and list its tensors."""
    from ..container import describe

    with about(file):
        info = describe(file)
    if as_json:
        rows = [
            {
                "name": t.name,
                "kind": t.kind,
                "shape": list(t.shape),
                "codes": t.codes,
                "block": t.block,
                "transform": t.transform,
                "basis": t.basis,
                "bytes": t.nbytes,
                "dense_bytes": t.dense_bytes,
                "bits_per_weight": t.bits_per_weight,
            }
            for t in info.tensors
        ]
        print_json(
            {
                "path": info.path,
                "version": info.version,
                "file_bytes": info.file_bytes,
                "header_bytes": info.header_bytes,
                "dense_bytes": info.dense_bytes,
                "ratio": info.ratio,
                "config": info.config,
                "tensors": rows,
            }
        )
        return
    table = new_table("tensor", "kind", ">shape", "codes", "transform", ">block", ">bytes", ">bits/weight")
    for t in info.tensors:
        table.add_row(
            escaped(t.name),
            t.kind,
            "x".join(map(str, t.shape)),
            t.codes,
            "" if t.transform is None else t.transform + (" + basis" if t.basis else ""),
            "" if t.block is None else str(t.block),
            size(t.nbytes),
            f"{t.bits_per_weight:.2f}",
        )
    model = info.config.get("model_type")
    show(
        table,
        f"{info.path}: format version {info.version}, {len(info.tensors)} tensors, "
        f"{size(info.file_bytes)}, {info.ratio:.2f} times smaller than float32"
        + (f"; model {escaped(model)}" if isinstance(model, str) else ""),
    )
