#!/usr/bin/env bash
# All tests, stage by stage, in the project's own environment: two stages at a time where there are two cores.
#
#   bash tests/run.sh                 what every change must pass: 9 to 16 minutes on 2 idle cores, by processor; limit 20
#   bash tests/run.sh --full          the tests marked `full` too, at most 3 hours
#   bash tests/run.sh unit parallel   only these stages
#
#   JACKPOT_TEST_LIMIT_S   another limit for all of it
#   JACKPOT_TEST_JOBS      stages at a time; with 1 their output comes as they run, not as they end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh

full=""
stages=()
for word in "$@"; do
  case "$word" in
    --full) full=--full ;;
    *)
      [[ -d tests/$word ]] || { echo "tests/run.sh: there is no tests/$word" >&2; exit 2; }
      stages+=("$word")
      ;;
  esac
done
if (( ${#stages[@]} == 0 )); then
  # The longest first, so that at the end nothing waits for it alone.
  stages=(parallel e2e faults launch models kernels unit fuzz types rewards study)
  for path in tests/*/; do
    name=$(basename "$path")
    [[ $name == __* || " ${stages[*]} " == *" $name "* ]] || stages+=("$name")
  done
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
limit="${JACKPOT_TEST_LIMIT_S:-$([[ $full ]] && echo 10800 || echo 1200)}"
jobs="${JACKPOT_TEST_JOBS:-$(( $(env -u OMP_NUM_THREADS nproc) > 1 && ${#stages[@]} > 1 ? 2 : 1 ))}"
begin=$(date +%s)
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

run_stage() {  # STAGE: its output into STAGE.log, "STATUS SECONDS" into STAGE.end; neither where no time is left
  local stage=$1 log="$logs/$1.log" start status left
  start=$(date +%s)
  left=$((begin + limit - start))
  if (( left <= 0 )); then return; fi
  # SIGINT at the limit, so that pytest still ends the processes its tests started.
  local command=(timeout --foreground --signal=INT --kill-after=60 "$left" python -m pytest "tests/$stage" $full)
  if (( jobs > 1 )); then
    "${command[@]}" >"$log" 2>&1
    status=$?
    { flock 9; echo "== tests/$stage"; cat "$log"; } 9>"$logs/lock"  # One stage's output after another's.
  else
    echo "== tests/$stage"
    "${command[@]}" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
  fi
  echo "$status $(($(date +%s) - start))" >"$logs/$stage.end"
}
work() {  # STAGE...: those of them that no other has begun
  local stage
  for stage in "$@"; do
    if mkdir "$logs/$stage.begun" 2>/dev/null; then run_stage "$stage"; fi
  done
}
export -f run_stage work
export logs begin limit jobs full

# Those with several processes at a time come one after another, beside those that have one or wait: two of
# them at once would be four ranks and more on two cores.
chosen=() several=() single=()
for stage in "${stages[@]}"; do
  [[ -n $(find "tests/$stage" -name 'test_*.py' -print -quit 2>/dev/null) ]] || continue
  chosen+=("$stage")
  case $stage in parallel | e2e | faults) several+=("$stage") ;; *) single+=("$stage") ;; esac
done
for (( job = 0; job < jobs; job++ )); do
  if (( job == 0 )); then echo "${several[*]} ${single[*]}"; else echo "${single[*]} ${several[*]}"; fi
done | xargs -P "$jobs" -I '{}' bash -c 'work {}' || true

count() {  # STAGE WORD: the number before it in pytest's closing line
  grep -aE '^=+ .* in [0-9.]+s' "$logs/$1.log" | tail -n 1 | grep -oE "[0-9]+ $2" | grep -oE '[0-9]+' || echo 0
}

passed=0 failed=0 skipped=0 missed=0
echo "== stages, $(($(date +%s) - begin)) s in all"
for stage in "${chosen[@]}"; do
  if [[ ! -f $logs/$stage.end ]]; then
    echo "  $stage: not run, the limit of $limit s is used up (JACKPOT_TEST_LIMIT_S sets another)"
    missed=$((missed + 1))
    continue
  fi
  read -r status seconds <"$logs/$stage.end"
  passed=$((passed + $(count "$stage" passed)))
  skipped=$((skipped + $(count "$stage" skipped)))
  bad=$(( $(count "$stage" failed) + $(count "$stage" errors?) ))
  note=""
  case $status in
    0 | 5) ;;  # 5: everything in this stage was left out
    124) note=", ended at the limit of $limit s"; bad=$((bad + 1)) ;;
    *) bad=$(( bad > 0 ? bad : 1 )) ;;
  esac
  failed=$((failed + bad))
  echo "  $stage: $seconds s$note"
done
echo "$passed passed, $failed failed, $skipped skipped, $missed stages not run"
(( failed == 0 && missed == 0 && passed > 0 ))
