#!/usr/bin/env bash
# The README's curves and table: the quickstart with several seeds and threads, the control, one picture.
#
#   bash benchmarks/quickstart.sh FOLDER                     seeds 0-4 as run.sh starts them, and with a rank of 2 threads
#   bash benchmarks/quickstart.sh FOLDER 0 1 2:1x1           SEED or SEED:RANKSxTHREADS, in this order
#   bash benchmarks/quickstart.sh FOLDER 0 run.steps=4       key=value for all of them: a trial
#
# Runs go to FOLDER/seed0-2x1 and so on; what is complete there already is kept, so some seeds may be done today
# and the others tomorrow, and one that was broken off begins anew. The table is printed and written to FOLDER/table.md,
# the picture to FOLDER/quickstart.png, of the runs that are named. Five minutes a run on 2 idle cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seeds=(0 1 2 3 4 0:1x2 1:1x2 2:1x2 3:1x2 4:1x2)
source benchmarks/seeds.sh "$@"

runs=()
for run in "${seeds[@]}"; do
  seed=${run%%:*} layout=2x1
  if [[ $run == *:* ]]; then layout=${run#*:}; fi
  folder="$out/seed$seed-$layout"
  runs+=("$folder")
  if [[ -f $folder/seconds ]]; then continue; fi
  start=$SECONDS
  megatron-jackpot launch examples/quickstart/run.yaml "policy.hf=$models/policy" "actor.hf=$models/actor" \
    "run.folder=$folder" "run.seed=$seed" --nproc "${layout%x*}" "parallel.threads=${layout#*x}" run.resume=auto "${overrides[@]}"
  echo $((SECONDS - start)) >"$folder/seconds"
done
control="${runs[0]}/control.jsonl"
if [[ ! -f $control.done ]]; then
  rm -f "$control"
  python examples/quickstart/control.py "$models" "${runs[0]}"
  touch "$control.done"
fi
python tools/plot.py "${runs[@]}" --control "$control" --out "$out/quickstart.png"
python benchmarks/quickstart_table.py "${runs[@]}" --control "$control" | tee "$out/table.md"
