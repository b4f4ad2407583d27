#!/usr/bin/env bash
# The main job on one CPU machine: environment, warm-up of two tiny models (both cached), Jackpot RL, plot.
#
#   bash examples/quickstart/run.sh
#   bash examples/quickstart/run.sh run.seed=1 algorithm.correction.name=none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh

folder="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for override in "$@"; do
  if [[ $override == run.folder=* ]]; then folder="${override#run.folder=}"; fi
done

models=$(python examples/quickstart/prepare.py | tail -n 1)
megatron-jackpot launch examples/quickstart/run.yaml \
  "policy.hf=$models/policy" "actor.hf=$models/actor" "run.folder=$folder" "$@"
python tools/plot.py "$folder"
