#!/usr/bin/env bash
# Everything that only a machine with a GPU can show, in one command: `bash bench/gpu.sh`. Builds what is not built yet
# into build/gpu (without touching any installed package), then runs bench/gpu.py, which proves the kernels, times them
# and writes bench/results/<gpu>.json. Options are those of bench/gpu.py: `bash bench/gpu.sh --part timing`.
#
# Needs, in the environment of $PYTHON (default python3): torch for CUDA, triton, pytest, hypothesis, pybind11, numpy;
# cmake, a C++ compiler, and nvcc for the CUDA kernels (without it only Triton's are built and tested). No network.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

fail() {
  echo "error: $*" >&2
  exit 2
}

facts='
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"torch cannot be imported ({error})")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device")
missing = []
for name in ("numpy", "triton", "pytest", "hypothesis", "pybind11"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
if missing:
    sys.exit("missing packages: " + " ".join(missing))
import pybind11
print("%d%d" % torch.cuda.get_device_capability(), pybind11.get_cmake_dir())'
if ! found=$("$PYTHON" -c "$facts" 2>&1); then
  fail "this needs an NVIDIA GPU, a torch for CUDA and what the tests need; $PYTHON says: $found. Nothing was measured."
fi
read -r capability pybind <<<"${found##*$'\n'}" # the last line: importing torch may warn

command -v cmake >/dev/null || fail "cmake is not on PATH"
for folder in /usr/local/cuda/bin; do
  if ! command -v nvcc >/dev/null && [[ -x $folder/nvcc ]]; then PATH="$folder:$PATH"; fi
done
command -v nvcc >/dev/null || echo "no nvcc: the CUDA kernels are neither built nor tested" >&2

site=$PWD/build/gpu/site
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
began=$SECONDS
mkdir -p build/gpu
# The log is shown only where building fails.
if ! {
  cmake -S . -B build/gpu/native "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION="$version" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$pybind" -DCMAKE_CUDA_ARCHITECTURES="$capability" &&
    cmake --build build/gpu/native --parallel &&
    cmake --install build/gpu/native --prefix "$site"
} >build/gpu/build.log 2>&1; then
  tail -n 40 build/gpu/build.log >&2
  fail "building failed, see build/gpu/build.log"
fi
# Python files are links: findings name the commit of this checkout, and an edit needs no building.
for entry in python/transfuse/* triton_kernels bench; do
  ln -sfn "$PWD/$entry" "$site/transfuse/$(basename "$entry")"
done
echo "built for sm_$capability in $((SECONDS - began)) s"

export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" TRANSFUSE_REQUIRE_NATIVE=1
exec "$PYTHON" -m transfuse.bench.gpu "$@"
