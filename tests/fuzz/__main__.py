"""`python -m tests.fuzz TARGET --seconds N [--inputs N]`, or with files: runs those inputs alone."""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .budget import Slow, Tally
from .targets import TARGETS, Target

_HANG = 60  # seconds of real time after which libFuzzer ends a run; `budget` measures processor time
_MEMORY_MB = 4096
_TALLY = "tally"
_MEMORY = Path("/dev/shm")  # where inputs are written, if there is such a folder


def _prepare(name: str, scratch: Path) -> Target:
    """The target, with everything that it imports, and every kernel that it needs compiled."""
    from rbe_gpu import memory

    # once: reading /proc and the control groups takes a quarter of an input's time
    for function in ("total_bytes", "available_bytes"):
        setattr(memory, function, functools.cache(getattr(memory, function)))
    target = TARGETS[name](scratch)
    for seed in target.seeds:
        target.warm(seed)
    return target


def _fuzz(name: str, scratch: Path, seconds: int, inputs: int, findings: Path, seed: int) -> None:
    """Run until a time or a number of inputs, or the first input that fails, which is written to `findings`.

    libFuzzer ends the process.
    """
    try:
        import atheris
    except ImportError:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"tests.fuzz needs atheris (pip install 'rbe-gpu[fuzz]'), which has wheels for some interpreters of "
            f"Linux only; this is Python {version} on {sys.platform}"
        )
    with atheris.instrument_imports(include=list(TARGETS[name].modules)):
        import rbe_gpu.cli._app
        import rbe_gpu.models.compress  # noqa: F401
    target = _prepare(name, scratch)
    corpus = scratch / "corpus"
    corpus.mkdir()
    for i, data in enumerate(target.seeds):
        (corpus / f"seed-{i}").write_bytes(data)
    longest = 2 * max(map(len, target.seeds)) + 1000

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        data = target.mutated(data, rng, atheris.Mutate)
        while rng.random() < 0.3:
            data = target.mutated(data, rng, atheris.Mutate)
        return data[:max_size]

    findings.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-runs={inputs}",
        f"-max_len={longest}",
        f"-timeout={_HANG}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-artifact_prefix={findings}/{name}-",
        f"-seed={seed}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    tally = Tally(scratch / _TALLY)

    def run(data: bytes) -> None:
        start = time.process_time()
        try:
            target.run(data)
        except Slow:  # the first input of its kind may have compiled a kernel, which takes more than a second
            start = time.process_time()
            target.run(data)
        tally.add(time.process_time() - start)

    atheris.Setup([sys.argv[0], *options, str(corpus)], run, custom_mutator=mutator)
    atheris.Fuzz()


def _again(name: str, scratch: Path, files: list[Path]) -> None:
    """Run the inputs of files."""
    target = _prepare(name, scratch)
    for file in files:
        print(file, flush=True)
        target.run(file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("files", nargs="*", type=Path, help="run these inputs alone")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--inputs", type=int, default=-1, help="end after as many (default: no limit)")
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"), help="folder for inputs that fail")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0: another one every time")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.scratch:
        findings = chosen.findings.resolve()
        _fuzz(chosen.target, chosen.scratch, chosen.seconds, chosen.inputs, findings, chosen.seed)
    with tempfile.TemporaryDirectory(
        prefix="rbe-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None
    ) as scratch:
        if chosen.files:
            _again(chosen.target, Path(scratch), [file.resolve() for file in chosen.files])
            return
        command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--scratch", scratch]
        one_thread = {
            **os.environ,
            "RBE_NUM_THREADS": "1",
        }  # waking others takes longer than the work of an input
        code = subprocess.run(command, env=one_thread, check=False).returncode
        print(f"{chosen.target}: {Tally(Path(scratch) / _TALLY)}, {'a finding' if code else 'no finding'}")
    sys.exit(code)


if __name__ == "__main__":
    main()
