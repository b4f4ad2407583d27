#!/usr/bin/env bash
# Who bears staleness: the quickstart's learning curves in turn and four steps ahead, each correction, seed by seed.
#
#   bash benchmarks/ahead.sh FOLDER                     none, tis, jackpot at ahead 0 and 4, seeds 0-2: 18 runs
#   bash benchmarks/ahead.sh FOLDER 0 run.steps=4       seeds, and key=value for all of them: a trial
#
# Runs go to FOLDER/jackpot-0-seed0 and so on; what is complete there already is kept. The table is printed and
# written to FOLDER/table.md, the picture to FOLDER/ahead.png. Three to four minutes a run on 2 idle cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seeds=(0 1 2)
source benchmarks/seeds.sh "$@"

for seed in "${seeds[@]}"; do
  for correction in jackpot tis none; do
    for ahead in 0 4; do
      folder="$out/$correction-$ahead-seed$seed"
      if [[ -f $folder/complete ]]; then continue; fi
      megatron-jackpot launch examples/quickstart/run.yaml "policy.hf=$models/policy" "actor.hf=$models/actor" \
        "run.folder=$folder" "run.seed=$seed" "algorithm.correction={name: $correction}" "rollout.ahead=$ahead" \
        rollout.max_staleness=4 --nproc 2 parallel.threads=1 run.resume=auto "${overrides[@]}"
      touch "$folder/complete"
    done
  done
done
python benchmarks/ahead_table.py "$out" "${seeds[@]}" | tee "$out/table.md"
