#!/usr/bin/env bash
# Everything that waits for an H200, in one call of at most nine minutes; needs no network.
#
#   OUT=FOLDER bash tests/gpu/run_all.sh [NAME ...]     results in FOLDER/gpu.json and FOLDER/gpu.log
#   bash tests/gpu/run_all.sh --dry-run                 what would run, sizes, expected seconds
#   OUT=FOLDER bash tests/gpu/run_all.sh --tiny         the benchmarks in sizes for a CPU
#
#   JACKPOT_GPU_BUNDLE   a .tar.xz with Transformer Engine and megatron-core, unpacked in a scratch folder and put in front
#   JACKPOT_GPU_WHEELS   a folder of wheels that the machine lacks (tests/gpu/README.md), installed without an index
#   JACKPOT_GPU_SGLANG   a folder whose up.sh unpacks a stock SGLang and sets its environment (servers, loop)
#   JACKPOT_GPU_SERVER_FLAGS   of sglang.launch_server, for what that SGLang lacks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-python3}"

if [[ " $* " != *" --dry-run "* ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  if [[ -n ${JACKPOT_GPU_WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$scratch/wheels" "$JACKPOT_GPU_WHEELS"/*.whl
    export PYTHONPATH="$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
  fi
  if [[ -n ${JACKPOT_GPU_SGLANG:-} ]]; then
    bash "$JACKPOT_GPU_SGLANG/up.sh" unpack
    set +u
    # shellcheck disable=SC1091
    . "$JACKPOT_GPU_SGLANG/up.sh" env
    set -u
  fi
  if [[ -n ${JACKPOT_GPU_BUNDLE:-} ]]; then
    mkdir "$scratch/te"
    # By Python's own lzma: such a machine may have neither zstd nor xz.
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="fully_trusted")' \
      "$JACKPOT_GPU_BUNDLE" "$scratch/te"
    # The slimmed library finds NCCL only where torch's own copy lies.
    nccl=$("$python" -c 'import nvidia.nccl as n; print(list(n.__path__)[0] + "/lib")')
    export PYTHONPATH="$scratch/te${PYTHONPATH:+:$PYTHONPATH}"
    export LD_LIBRARY_PATH="$nccl${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  fi
fi
"$python" tests/gpu/plan.py "$@"
