"""Compile the CPU kernels for a wheel of one platform: `make wheel`.

    python build_kernels.py ENCODER [DECODER]     a model folder or file to run; a decoder's GGUF file
    python -m build --wheel

The first command fills `cpu_fallback/precompiled/`, for each of `INSTRUCTION_SETS` that this machine runs, with the
kernels that loading, compressing, calibrating and running these models compiles. The second packs them, and names the
wheel after this Python version and platform. Where the package is installed from it, the first texts are embedded
without a compilation (`cpu_fallback/_disk_cache.py` says when kernels are taken). Without the folder the wheel is
for all platforms.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: of `isa.ISAS`; on other processors, older than ten years, kernels are compiled when they are first called
INSTRUCTION_SETS = ("avx2", "avx512", "avx512-vnni", "neon", "neon-dotprod")
#: Ratios and codes of files without calibration.
PLAIN = ((3.5, "dense-int8"), (7, "dense-int4"), (8, None), (16, None))
TRAINED = sorted(Path(__file__).parent.glob("reports/models/*.rbe.safetensors"))
#: Sentences of several lengths: batches of few tokens and of many have their own kernels.
TEXTS = [" ".join(["Interest rates rose for the third time this year."] * (1 + i % 4)) for i in range(40)]


def run_encoder(source: str, scratch: Path) -> None:
    """Compress a model in every way, and embed with each result."""
    import rbe_gpu as rbe
    from rbe_gpu.models import corpus
    from rbe_gpu.models.text_embedder import TextEmbedder

    def embed(path: str | Path, *activations: str | None) -> None:
        for kind in activations:
            model = rbe.load(path, activations=kind)
            assert isinstance(model, TextEmbedder)
            for texts in (TEXTS, TEXTS[:2], TEXTS[:1], ["word"]):
                model.embed(texts)

    embed(source, None)
    for ratio, codes in PLAIN:
        rbe.compress_model(source, scratch / "plain.rbe.safetensors", ratio=ratio, codes=codes)
        embed(scratch / "plain.rbe.safetensors", *(("int8", "float") if codes else (None,)))
    rbe.compress_model(
        source, scratch / "calibrated.rbe.safetensors", ratio=8, calibrate=corpus.calibration(64)
    )
    embed(scratch / "calibrated.rbe.safetensors", "int8", "float")
    for trained in TRAINED:
        embed(trained, "int8", "float")


def run_decoder(source: str, scratch: Path) -> None:
    """Generate with a model, dense and compressed as `make generate` does."""
    import rbe_gpu as rbe
    from rbe_gpu.models.decoder import Decoder

    compressed = scratch / "decoder.rbe.safetensors"
    rbe.compress_model(source, compressed, ratio=6, transform="none", basis=False)
    for path in (source, compressed):
        model = rbe.load(path)
        assert isinstance(model, Decoder)
        for prompts in (TEXTS[3:4], ["word"], TEXTS[:3]):
            model.generate(prompts, 4, temperature=0.0)


def main(models: list[str]) -> None:
    from rbe_gpu.cpu_fallback import isa
    from rbe_gpu.cpu_fallback._numba_internals import PRECOMPILED, merge_precompiled

    shutil.rmtree(PRECOMPILED, ignore_errors=True)
    for name in INSTRUCTION_SETS:
        target, here = isa.ISAS[name], isa.host()
        if target.architecture != here.architecture or not here.has(*target.features):
            print(f"{name}: left out, this processor ({here.cpu}) does not run it")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            # SVML is a package that the user need not have
            env = os.environ | {
                isa.VARIABLE: name,
                "NUMBA_CACHE_DIR": f"{scratch}/kernels",
                "NUMBA_DISABLE_INTEL_SVML": "1",
            }
            subprocess.run([sys.executable, __file__, "--run", scratch, *models], env=env, check=True)
            print(f"{name}: {merge_precompiled(Path(scratch) / 'kernels')} kernels")
    if not PRECOMPILED.exists():
        sys.exit("this machine runs none of these instruction sets: nothing was compiled")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--run"]:
        scratch, encoder, *decoder = arguments[1:]
        run_encoder(encoder, Path(scratch))
        for source in decoder:
            run_decoder(source, Path(scratch))
    elif 1 <= len(arguments) <= 2:
        main(arguments)
    else:
        sys.exit(__doc__)
