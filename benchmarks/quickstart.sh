#!/usr/bin/env bash
# The README's curves: three seeds of the quickstart, the control, one picture. About 25 minutes on 2 cores.
#
#   bash benchmarks/quickstart.sh FOLDER       runs go to FOLDER/seed0..2, the picture to FOLDER/quickstart.png
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -eq 1 ]] || { echo "usage: bash benchmarks/quickstart.sh FOLDER" >&2; exit 2; }
out=$1
source tools/env.sh

models=$(python examples/quickstart/prepare.py | tail -n 1)
for seed in 0 1 2; do
  megatron-jackpot launch examples/quickstart/run.yaml \
    "policy.hf=$models/policy" "actor.hf=$models/actor" "run.folder=$out/seed$seed" "run.seed=$seed"
done
python examples/quickstart/control.py "$models" "$out/seed0"
python tools/plot.py "$out"/seed{0,1,2} --control "$out/seed0/control.jsonl" --out "$out/quickstart.png"
