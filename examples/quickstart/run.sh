#!/usr/bin/env bash
# The main job on one CPU machine: environment (cached), Jackpot RL on the two tiny models in models/, report.
#
#   bash examples/quickstart/run.sh
#   bash examples/quickstart/run.sh run.seed=1 algorithm.correction.name=none
#   bash examples/quickstart/run.sh examples/ablations/correction_icepop.yaml run.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh

config=examples/quickstart/run.yaml
if [[ ${1:-} == *.yaml ]]; then config=$1; shift; fi
folder="runs/$(basename "$(dirname "$config")")-$(date +%Y%m%d-%H%M%S)"
ranks=(--nproc 2 parallel.threads=1)    # a second rank is worth more to these small models than a second thread
for override in "$@"; do
  case "$override" in
    run.folder=*) folder="${override#run.folder=}" ;;
    parallel.* | --nproc*) ranks=() ;;
    -h | --help) exec megatron-jackpot launch --help ;;
  esac
done

models=$(python examples/quickstart/shipped.py)
folders=("policy.hf=$models/policy" "actor.hf=$models/actor")
if grep -q '^actor: null' "$config"; then unset 'folders[1]'; fi    # one model: there is no actor
megatron-jackpot launch "$config" "${folders[@]}" "run.folder=$folder" "${ranks[@]}" "$@" || {
  code=$?
  if [[ -d $folder ]]; then echo "[run.sh] first: cd $PWD && source tools/env.sh" >&2; fi
  exit "$code"
}
megatron-jackpot report "$folder"
