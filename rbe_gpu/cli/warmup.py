"""`rbe-gpu warmup`: compile the kernels of a model, for a GPU or for the CPU."""

from __future__ import annotations

from typing import Annotated

import typer

from ._compiling import compiling
from ._errors import about, fail, one_line, usage
from ._inputs import check_model
from ._output import Json, new_table, print_json, show


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A .rbe.safetensors file of a model, a folder or hf://OWNER/NAME."
        ),
    ],
    device: Annotated[
        int | None,
        typer.Option(min=0, max=1023, help="Index of the GPU in CUDA's order. Default: the current one."),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            min=75,
            max=999,
            help="Only check that the kernels compile for an architecture (75, 90, ...). Needs no GPU.",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compile the kernels for this machine's CPU.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the kernels that a model needs before its first batch.

    Those of the CPU are kept where Numba keeps them (NUMBA_CACHE_DIR), those of a GPU in ~/.cupy/kernel_cache or
    $CUPY_CACHE_DIR, for later processes with the same versions on such a processor. On a GPU two batches of one text
    then run, to compile CuPy's own kernels too.
    """
    if arch and device is not None:
        usage("leave one of them out: --arch compiles for no GPU of this machine", "--arch", "--device")
    check_model(source)
    if cpu and (arch or device is not None):
        usage("leave one of them out: --cpu compiles for no GPU", "--cpu", "--arch" if arch else "--device")
    from .. import warmup
    from ..models.architectures import encodes
    from ..models.load import load

    if cpu:
        with about(source), compiling(source, None):
            result = warmup.warm_cpu(load(source))
        if as_json:
            print_json(result)
            return
        first, second = result["first_batch_seconds"], result["second_batch_seconds"]
        kept = "nowhere" if result["cache"] is None else f"in {result['cache']}"
        show(
            f"cpu: {result['name']}; kernels kept {kept}",
            f"first batches {first:.1f} s, then {1e3 * second:.1f} ms",
        )
        return
    try:
        where = None if arch else warmup.gpu_named(device)
        with about(source):
            model = encodes(load(source), source, "the compilation for a GPU")
        result = warmup.compiled_only(model, arch or ()) if where is None else warmup.warm(model, where)
    except (ImportError, RuntimeError) as error:  # no CuPy, no GPU, no NVRTC, or too old a GPU
        fail(one_line(error))
    if as_json:
        print_json(result)
        return
    table = new_table("op", *(f">sm_{a['architecture']}" for a in result["compiled"]))
    for op in result["ops"]:
        table.add_row(
            op, *(f"{a['seconds'][op]:.2f} s" if op in a["seconds"] else "-" for a in result["compiled"])
        )
    sums = (f"{sum(a['seconds'].values()):.2f} s" for a in result["compiled"])
    table.add_row("all", *sums)
    table.add_row("elapsed", *(f"{a['elapsed_seconds']:.2f} s" for a in result["compiled"]))
    compiled = f"{result['kernels']} kernels, compiled in {result['processes']} processes"
    if arch:
        show(
            table,
            compiled,
            "nothing is kept: CuPy keeps kernels only where their GPU is; run rbe-gpu warmup there too",
        )
        return
    first, second = result["first_batch_seconds"], result["second_batch_seconds"]
    show(
        table,
        compiled,
        f"{result['device']}: {result['name']}; kept in {result['cache']}",
        f"weights moved in {result['move_seconds']:.2f} s; first batch {1e3 * first:.1f} ms, second "
        f"{1e3 * second:.1f} ms ({result['tokens']} tokens)",
    )
