"""`rbe-gpu info`: this machine, the installed versions and what is missing."""

from __future__ import annotations

from ._output import Json, new_table, print_json, show, size


def command(as_json: Json = False) -> None:
    """Show the CPU, the GPUs, installed versions, and what is missing."""
    from ..machine import collect

    info = collect()
    if as_json:
        print_json(info)
        return
    cpu = info["cpu"]
    table = new_table("what", "value")
    table.show_header = False
    table.add_row("rbe-gpu", f"{info['rbe_gpu']}, Python {info['python']}")
    table.add_row("platform", info["platform"])
    table.add_row("CPU", f"{cpu['name']} ({cpu['llvm_name']})")
    counts = [f"{cpu[name]} {name}" for name in ("cores", "threads") if cpu[name] is not None]
    if cpu["memory_bytes"] is not None:
        counts.append(size(cpu["memory_bytes"]))
    table.add_row("cores", ", ".join(counts))
    table.add_row("Numba threads", str(info["numba_threads"]))
    table.add_row("SIMD", " ".join(cpu["simd"]) or "none that is known here")
    for name, version in info["versions"].items():
        table.add_row(name, version or "not installed")
    for index, gpu in enumerate(info["gpus"]):
        table.add_row(
            f"GPU {index}",
            f"{gpu['name']}, {size(gpu['free_bytes'])} free of {size(gpu['memory_bytes'])}, compute "
            f"capability {gpu['compute_capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}",
        )
        status = "compiled when first called" if gpu["supported"] else "not supported"
        table.add_row("", f"kernels for {gpu['architecture']}: {status}")
    if not info["gpus"]:
        table.add_row("GPU", "none")
    cupy, kernels = info["cupy"], info["kernels"]
    if cupy["works"]:
        architectures = " ".join(f"sm_{a}" for a in cupy["architectures"])
        table.add_row("CUDA of CuPy", f"{cupy['cuda'] or 'none'}, NVRTC {cupy['nvrtc'] or 'none'}")
        table.add_row("compiles for", architectures or "nothing")
    table.add_row("CUDA kernels", f"{', '.join(kernels['ops']) or 'none'} ({kernels['oldest']} and newer)")
    # outside the table, which truncates long lines
    show(table, *(f"missing: {line}" for line in info["missing"]))
