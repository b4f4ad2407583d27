#!/usr/bin/env bash
# The job scripts on a real two-node Slurm cluster on this machine: installs slurm-wlm and munge, trains the
# quickstart's pair, interrupts it, kills a node's daemon, runs an array, and is refused an impossible layout.
#
#   bash tests/slurm/run.sh FOLDER              all of it, about 25 minutes on 2 cores; needs root (Debian)
#   bash tests/slurm/run.sh FOLDER signals      only these, of all that stand last in this file
#
# Every wait has a limit. What was started is ended; FOLDER keeps the runs and the cluster's logs.
set -euo pipefail
out=$(realpath -m "${1:?usage: bash tests/slurm/run.sh FOLDER [SCENARIO ...]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/env.sh
source tests/slurm/cluster.sh
mkdir -p "$out"
chmod 755 "$out"

PATIENCE=${PATIENCE:-1}  # times every limit, for a busy machine

say() { printf '[slurm test] %s %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { say "FAILED: $*"; exit 1; }

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  say "installing slurm-wlm and munge"
  apt-get update -q >"$out/apt.log" 2>&1
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge >>"$out/apt.log" 2>&1
fi
models=$(python examples/quickstart/shipped.py)

submit() {  # RUN_FOLDER [key=value ...]: prints the id
  local folder=$1 said
  shift
  said=$(megatron-jackpot launch examples/quickstart/run.yaml "policy.hf=$models/policy" "actor.hf=$models/actor" \
    "run.folder=$folder" cluster.nodes=2 cluster.server_nodes=1 cluster.gpus_per_node=0 cluster.trainer_procs=1 \
    cluster.interface=lo run.steps=6 run.save_every=2 run.stop_margin_s=0 evaluation.size=64 "$@" --slurm) ||
    die "not submitted: $said"
  sed -n 's/^Submitted job \([0-9]*\).*/\1/p' <<<"$said" | tail -n 1
}

wait_for() {  # SECONDS WHAT COMMAND...
  local limit=$((SECONDS + PATIENCE * $1)) what=$2 least=$((PATIENCE * $1))
  shift 2
  until "$@"; do
    (( SECONDS < limit )) || die "waited $least s for $what"
    sleep 0.1
  done
}

state() { scontrol show job "$1" -o 2>/dev/null | head -n 1 | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
ended() { [[ $(state "$1") =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL)$ ]]; }
running() { [[ $(state "$1") == RUNNING ]]; }
completed() { [[ $(state "$1") == COMPLETED ]] || die "job $1 ended as $(state "$1"), see $out"; }
reached() { [[ -s $1/metrics.jsonl ]] && grep -q "\"step\": $2[,}]" "$1/metrics.jsonl"; }
restarted() {  # JOB OUTPUT TIMES
  ! ended "$1" || die "job $1 ended as $(state "$1") instead of being requeued, see $2"
  (( $(grep -c 'servers on' "$2") > $3 ))
}

unbroken() {  # RUN_FOLDER STEPS: rows 0 .. STEPS, each once
  python - "$1/metrics.jsonl" "$2" <<'PY' || die "the steps of $1 are not 0 to $2, each once"
import json, sys
steps = [json.loads(line)["step"] for line in open(sys.argv[1])]
print("steps", steps)
sys.exit(steps != list(range(int(sys.argv[2]) + 1)))
PY
}

scenario_refused() {  # before anything is submitted, with the arithmetic
  local said
  if said=$(megatron-jackpot launch examples/quickstart/run.yaml "policy.hf=$models/policy" \
    "actor.hf=$models/actor" "run.folder=$out/refused" cluster.nodes=2 cluster.gpus_per_node=8 servers.tp=2 \
    parallel.tp=8 --slurm 2>&1); then die "accepted: $said"; fi
  say "$said"
  grep -q '2 training nodes x 6 processes = 12. 12 training processes are no multiple' <<<"$said" || die "other words"
  if [[ -e $out/refused || -n $(squeue -h) ]]; then die "something was submitted"; fi
}

scenario_two_nodes() {  # servers on one node, torchrun over both
  local folder=$out/two_nodes job name
  job=$(submit "$folder")
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder" 6
  for name in "slurm/$job.out" slurm/job.sbatch config.yaml provenance.json metrics.jsonl \
    train-n1.log train-n2.log servers/n1/server-0.log "slurm/$job-0/master.json" "slurm/$job-0/servers/0.json"; do
    [[ -e $folder/$name ]] || die "$folder/$name is missing"
  done
  [[ -z $(find "$folder/slurm" -maxdepth 1 -name '*.yaml') ]] || die "the job's configuration was left"
  [[ ! -e $folder/servers/n2 ]] || die "a server ran on n2"
  ! grep -E 'Killed|CANCELLED' "$folder/slurm/$job.out" || die "the servers were killed instead of ended"
}

# Sends USR1 to the batch shell `wait` seconds after a row; the last row's own times tell where the run is then.
in_phase() {  # RUN_FOLDER rollout|update
  python - "$1/metrics.jsonl" "$2" <<'PY'
import json, sys
row = json.loads(open(sys.argv[1]).read().splitlines()[-1])
before = row["time/rollout"] + row["time/score"] + row["time/correct"]
print(0.3 * row["time/rollout"] if sys.argv[2] == "rollout" else before + 0.5 * row["time/update_policy"])
PY
}

scenario_signals() {  # USR1 in a rollout, then in an update: saved, requeued, continued
  local folder=$out/signals job phase step=0 count=0 rows
  job=$(submit "$folder" run.steps=9 run.save_every=null)
  for phase in rollout update; do
    count=$((count + 1)) step=$((step + 2))
    wait_for 400 "step $step" reached "$folder" "$step"
    rows=$(wc -l <"$folder/metrics.jsonl")
    sleep "$(in_phase "$folder" "$phase")"
    scancel --batch --signal=USR1 "$job"
    say "USR1 to job $job in the $phase after $((rows - 1)) steps"
    wait_for 300 "the requeued job's start" restarted "$job" "$folder/slurm/$job.out" "$count"
    grep -q 'saved; requeueing' "$folder/slurm/$job.out" || die "it was not the script that requeued"
    step=$(( $(wc -l <"$folder/metrics.jsonl") - 1 ))
  done
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder" 9
  grep -hE 'resumed after step|SIGUSR1|SIGTERM|with code|requeueing' "$folder/slurm/$job.out"
  (( $(grep -c 'resumed after step' "$folder/slurm/$job.out") == 2 )) || die "it did not resume twice"
}

scenario_limit() {  # Slurm's own USR1 before the time limit
  local folder=$out/limit job
  job=$(submit "$folder" run.steps=60 run.save_every=null cluster.minutes=3 cluster.signal_s=45)
  wait_for 400 "the requeued job's start" restarted "$job" "$folder/slurm/$job.out" 1
  grep -q 'SIGUSR1' "$folder/slurm/$job.out" || die "no signal before the limit"
  wait_for 300 "the run to go on" grep -q 'resumed after step' "$folder/slurm/$job.out"
  local resumed
  resumed=$(sed -n 's/.*resumed after step \([0-9]*\).*/\1/p' "$folder/slurm/$job.out")
  wait_for 300 "step $((resumed + 1))" reached "$folder" "$((resumed + 1))"
  scancel "$job"
  wait_for 60 "job $job to end" ended "$job"
  unbroken "$folder" "$(( $(wc -l <"$folder/metrics.jsonl") - 1 ))"
}

scenario_daemon() {  # kill -9 of n2's slurmd: Slurm finds the node down, requeues, and the run goes on
  local folder=$out/daemon job
  job=$(submit "$folder" run.steps=9)
  wait_for 400 "a checkpoint" test -d "$folder/checkpoints/step-000002"
  end_pid_file "$CLUSTER/run/slurmd-n2.pid" KILL
  say "killed n2's slurmd"
  wait_for 200 "job $job to be requeued" bash -c "[[ \$(scontrol show job $job -o) == *Restarts=1* ]]"
  start_node n2
  wait_for 600 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder" 9
  grep -hE 'resumed after step' "$folder/slurm/$job.out" || die "it did not resume"
}

scenario_rank() {  # kill -9 of n2's rank: both nodes' torchrun end and start again from the checkpoint, in the same job
  local folder=$out/rank job
  job=$(submit "$folder")
  wait_for 400 "a checkpoint" test -d "$folder/checkpoints/step-000002"
  python - "$job" <<'PY' || die "no rank of job $job on n2"
import os, signal, sys
import psutil
for process in psutil.process_iter():
    try:
        words, place = process.cmdline(), process.environ()
    except psutil.Error:
        continue
    if "megatron_jackpot.cli" in words and "train" in words and place.get("SLURM_JOB_ID") == sys.argv[1]:
        if place["SLURMD_NODENAME"] == "n2":
            print("killing", process.pid)
            sys.exit(os.kill(process.pid, signal.SIGKILL))
sys.exit(1)
PY
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder" 6
  grep -hE 'starting again|resumed after step' "$folder/slurm/$job.out" || die "it was not started again"
  (( $(grep -c 'servers on' "$folder/slurm/$job.out") == 1 )) || die "it was requeued"
}

server_of() {  # JOB: the process of its first server
  python - "$1" <<'PY'
import sys
import psutil
for process in psutil.process_iter():
    try:
        words, place = process.cmdline(), process.environ()
    except psutil.Error:
        continue
    if place.get("SLURM_JOB_ID") == sys.argv[1] and any("sglang" in word for word in words):
        print(process.pid)
        break
PY
}

scenario_servers() {  # one that never stands: the job fails at once; one that is lost for good: saved and requeued
  local folder=$out/servers job
  job=$(submit "$folder/never" 'servers.extra_args=[--no-such-flag]')
  wait_for 200 "job $job to end" ended "$job"
  [[ $(state "$job") == FAILED ]] || die "job $job ended as $(state "$job")"
  grep -h 'not requeued' "$folder/never/slurm/$job.out" || die "it did not say why"
  job=$(submit "$folder/lost" servers.max_restarts=0)
  wait_for 400 "a checkpoint" test -d "$folder/lost/checkpoints/step-000002"
  kill -9 "$(server_of "$job")"
  wait_for 300 "the requeued job's start" restarted "$job" "$folder/lost/slurm/$job.out" 1
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder/lost" 6
  grep -hE 'servers ended with code|training ended|resumed after step' "$folder/lost/slurm/$job.out"
}

scenario_array() {  # two seeds at once on the same two nodes
  local folder=$out/array job seed
  job=$(submit "$folder" run.steps=2 'cluster.seeds=[0,1]')
  wait_for 600 "the array to end" bash -c "[[ -z \$(squeue -h -j $job) ]]"
  for seed in 0 1; do
    unbroken "$folder/seed-$seed" 2
    grep -q "seed: $seed" "$folder/seed-$seed/config.yaml" || die "seed $seed is not in its configuration"
  done
}

scenario_disaggregated() {  # training on n1, servers on n2; --chain: a second job finds the run done
  local folder=$out/disaggregated job last
  last=$(submit "$folder" run.steps=2 cluster.layout=disaggregated --chain 2)
  job=$((last - 1))
  wait_for 600 "job $last to end" ended "$last"
  completed "$job"
  completed "$last"
  unbroken "$folder" 2
  [[ -e $folder/train-n1.log && -e $folder/servers/n2/server-0.log ]] || die "the roles are on other nodes"
  [[ ! -e $folder/train-n2.log && ! -e $folder/servers/n1 ]] || die "the roles are not apart"
  grep -h 'nothing to do: ' "$folder/slurm/$last.out" || die "the second job did not find the run done"
}

scenario_by_hand() {  # the script as it stands in slurm/, submitted by sbatch, an array and a dependency included
  local folder=$out/by_hand job after seed
  local overrides=("policy.hf=$models/policy" "actor.hf=$models/actor" cluster.nodes=2 cluster.server_nodes=1
    cluster.gpus_per_node=0 cluster.trainer_procs=1 cluster.interface=lo run.steps=2 run.save_every=2 run.stop_margin_s=0
    evaluation.size=64)
  # What `launch --slurm` would have taken from the YAML; a cluster's users write it into the #SBATCH lines.
  local options=(--parsable --nodes=2 --gpus-per-node=0 --oversubscribe "--output=$out/by_hand-%j.out")
  job=$(JACKPOT_SERVER_NODES=1 sbatch "${options[@]}" slurm/colocated.sbatch examples/quickstart/run.yaml \
    "run.folder=$folder" "${overrides[@]}") || die "sbatch refused it"
  after=$(JACKPOT_SERVER_NODES=1 sbatch "${options[@]}" --array=3 "--dependency=afterany:$job" slurm/colocated.sbatch \
    examples/quickstart/run.yaml "run.folder=$folder" "${overrides[@]}") || die "sbatch refused the array"
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken "$folder" 2
  wait_for 400 "array $after to end" bash -c "[[ -z \$(squeue -h -j $after) ]]"
  unbroken "$folder/seed-3" 2
}

scenario_literal() {  # the commands of docs/clusters.md's first section, as they stand there
  python - "$out/literal.sh" <<'PY'
import re, sys
text = open("docs/clusters.md").read()
block = re.search(r"## Try it.*?```bash\n(.*?)```", text, re.DOTALL)[1]
open(sys.argv[1], "w").write(block)
PY
  cat "$out/literal.sh"
  rm -rf runs/slurm-try
  bash -e "$out/literal.sh" | tee "$out/literal.out"
  local job
  job=$(sed -n 's/^Submitted.* job \([0-9]*\).*/\1/p' "$out/literal.out" | tail -n 1)
  wait_for 400 "job $job to end" ended "$job"
  completed "$job"
  unbroken runs/slurm-try 2
}

scenarios=("$@")
if (( ${#scenarios[@]} == 0 )); then
  scenarios=(refused two_nodes disaggregated by_hand signals limit daemon rank servers array literal)
fi
trap cluster_down EXIT
cluster_up "$out/cluster"
for name in "${scenarios[@]}"; do
  begin=$SECONDS
  say "== $name"
  rm -rf "${out:?}/$name"
  "scenario_$name"
  say "== $name: passed in $((SECONDS - begin)) s"
done
say "passed: ${scenarios[*]}"
