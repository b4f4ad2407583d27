# shellcheck shell=bash
# What both job scripts share. Sourced with: JACKPOT_REPO, and the arguments CONFIG [key=value ...] in "$@".
#
# Settings, all with defaults; `launch --slurm` fills them in from the YAML's cluster section:
#   JACKPOT_RUNTIME       bare (default) | pyxis | apptainer
#   JACKPOT_IMAGE         container image, as the runtime spells it
#   JACKPOT_MOUNTS        HOST:CONTAINER,HOST:CONTAINER folders a container sees
#   JACKPOT_SETUP         bash file that every bare step sources first, for example tools/env.sh
#   JACKPOT_MAX_REQUEUES  how often this job may requeue itself, default 100
set -uo pipefail

say() { printf '[job %s] %s %s\n' "$SLURM_JOB_ID" "$(date +%H:%M:%S)" "$*"; }

# The command of one step, in the array `step`: COMMAND of megatron-jackpot in the container or the bare environment.
make_step() {  # COMMAND CONFIG [key=value ...]
  local run=(python -m megatron_jackpot.cli "$@") bind
  step=()
  case "${JACKPOT_RUNTIME:-bare}" in
    bare)
      # shellcheck disable=SC2016  # expanded by the step's own shell
      step=(bash -c 'if [[ -n $1 ]]; then source "$1" || exit 1; fi; shift; exec "$@"' step "${JACKPOT_SETUP:-}" "${run[@]}")
      ;;
    pyxis)
      step=("--container-image=$JACKPOT_IMAGE" "--container-workdir=$PWD")
      if [[ -n ${JACKPOT_MOUNTS:-} ]]; then step+=("--container-mounts=$JACKPOT_MOUNTS"); fi
      step+=("${run[@]}")
      ;;
    apptainer)
      bind=(apptainer exec --pwd "$PWD")
      if [[ -n ${JACKPOT_MOUNTS:-} ]]; then bind+=(--bind "$JACKPOT_MOUNTS"); fi
      if command -v nvidia-smi >/dev/null; then bind+=(--nv); fi
      step=("${bind[@]}" "$JACKPOT_IMAGE" "${run[@]}")
      ;;
    *) say "JACKPOT_RUNTIME=$JACKPOT_RUNTIME is none of bare, pyxis, apptainer"; exit 2 ;;
  esac
}

# One task on each of NODES nodes from the RELATIVE-th on, in the background; its srun is `$!`.
start_step() {  # NODES RELATIVE COMMAND CONFIG [key=value ...]
  local nodes=$1 relative=$2 step
  shift 2
  make_step "$@"
  # One task owns the node: without --cpu-bind=none it would be bound to a single core. --overlap: both roles may
  # share nodes, and GPUs are divided by the processes themselves. --wait: nodes end with codes of their own a moment
  # apart, and none may outlive the first for long.
  srun --nodes="$nodes" --relative="$relative" --ntasks="$nodes" --ntasks-per-node=1 --overlap --cpu-bind=none \
    --kill-on-bad-exit=0 --wait=120 --label "${step[@]}" &
}

ended() { ! kill -0 "$1" 2>/dev/null; }

requeue() {
  local count=${SLURM_RESTART_COUNT:-0}
  if (( count >= ${JACKPOT_MAX_REQUEUES:-100} )); then
    say "requeued $count times already (JACKPOT_MAX_REQUEUES): submit it again to go on"
    return 1
  fi
  say "saved; requeueing (so far $count times)"
  scontrol requeue "$SLURM_JOB_ID"
}

# SIGUSR1 and SIGTERM reach this shell alone (Slurm's --signal=B:, scancel --batch). Both mean: save and end. srun
# passes SIGUSR1 on to every node of the trainers' step; on SIGTERM it would have the step killed. The servers' step
# ends when the trainers have saved, which needs it.
trainers="" asked=""
save_and_end() {  # WHY
  say "$1: telling the trainers to save"
  asked=1
  if [[ -n $trainers ]]; then kill -s USR1 "$trainers"; fi
}

# srun passes SIGUSR2 on, and `serve` ends its servers; on SIGTERM srun would have the step killed.
end_servers() {  # SRUN
  local tries
  if ! ended "$1"; then kill -s USR2 "$1"; fi
  for (( tries = 0; tries < 40; tries++ )); do
    if ended "$1"; then break; fi
    sleep 1
  done
  if ! ended "$1"; then say "the servers did not end within 40 s"; kill -TERM "$1"; fi
  wait "$1"
}

# Servers on some nodes, training on some, possibly the same; ends as training ends.
run_job() {  # SERVER_NODES SERVERS_FROM TRAINER_NODES TRAINERS_FROM CONFIG [key=value ...]
  local server_nodes=$1 servers_from=$2 trainer_nodes=$3 trainers_from=$4 servers code lost=0 servers_code=0
  shift 4
  export PYTHONUNBUFFERED=1
  # An image has a copy of its own, where this path means nothing.
  if [[ ${JACKPOT_RUNTIME:-bare} == bare ]]; then
    export PYTHONPATH="$JACKPOT_REPO${PYTHONPATH:+:$PYTHONPATH}"
  fi
  say "nodes $SLURM_JOB_NODELIST: servers on $server_nodes from number $servers_from on," \
    "training on $trainer_nodes from number $trainers_from on"
  # Servers on several nodes are reached over the network: they and the trainers share a key of this attempt.
  : "${JACKPOT_API_KEY:=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=')}"
  export JACKPOT_API_KEY
  trap 'save_and_end SIGUSR1' USR1
  trap 'save_and_end SIGTERM' TERM
  start_step "$server_nodes" "$servers_from" serve "$@"
  servers=$!
  start_step "$trainer_nodes" "$trainers_from" join "$@"
  trainers=$!
  if [[ -n $asked ]]; then save_and_end "before it began"; fi
  while ! ended "$trainers"; do
    if (( ! lost )) && ended "$servers"; then
      lost=1
      wait "$servers"
      servers_code=$?
      save_and_end "the servers ended with code $servers_code"
    fi
    sleep 1 &
    wait $!  # unlike a sleep in the foreground it lets a trap run at once
  done
  wait "$trainers"
  code=$?
  # 128 + SIGUSR1: a node was still setting up, or srun was, so that nobody heard it and there was nothing to save.
  if [[ -n $asked ]] && (( code == 138 )); then code=75; fi
  trap '' USR1 TERM
  end_servers "$servers"
  say "training ended with code $code"
  # In a later attempt they stood before: it may be the node, and the job is queued again like any other.
  if (( servers_code == 2 && ${SLURM_RESTART_COUNT:-0} == 0 )); then
    say "the servers never stood: see their logs; not requeued"
    exit 2
  fi
  if (( code == 75 )) && requeue; then
    sleep 60  # Slurm ends this script now
  fi
  exit "$code"
}
