#!/usr/bin/env bash
# All tests, stage by stage, in the project's own environment.
#
#   bash tests/run.sh                 what every change must pass: at most 20 minutes on 2 cores
#   bash tests/run.sh --full          the tests marked `full` too, at most 3 hours (or JACKPOT_TEST_LIMIT_S)
#   bash tests/run.sh unit parallel   only these stages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh

full=()
stages=()
for word in "$@"; do
  case "$word" in
    --full) full=(--full) ;;
    *)
      [[ -d tests/$word ]] || { echo "tests/run.sh: there is no tests/$word" >&2; exit 2; }
      stages+=("$word")
      ;;
  esac
done
if (( ${#stages[@]} == 0 )); then
  stages=(config unit laws launch data rewards servers rollout sync parallel e2e)
  for path in tests/*/; do
    name=$(basename "$path")
    [[ $name == __* || " ${stages[*]} " == *" $name "* ]] || stages+=("$name")
  done
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
limit="${JACKPOT_TEST_LIMIT_S:-$(( ${#full[@]} ? 10800 : 1200 ))}"
begin=$SECONDS
passed=0 failed=0 skipped=0
report=""
log=$(mktemp)
trap 'rm -f "$log"' EXIT

count() {  # WORD: the number before it in pytest's closing line
  tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0
}

for stage in "${stages[@]}"; do
  [[ -n $(find "tests/$stage" -name 'test_*.py' -print -quit 2>/dev/null) ]] || continue
  left=$((limit - (SECONDS - begin)))
  if (( left <= 0 )); then
    report+="  $stage: not run, the limit of $limit s is used up"$'\n'
    failed=$((failed + 1))
    continue
  fi
  echo "== tests/$stage"
  start=$SECONDS
  status=0
  # SIGINT at the limit, so that pytest still ends the processes its tests started.
  timeout --foreground --signal=INT --kill-after=60 "$left" \
    python -m pytest "tests/$stage" "${full[@]}" 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
  passed=$((passed + $(count passed)))
  skipped=$((skipped + $(count skipped)))
  bad=$(( $(count failed) + $(count errors?) ))
  note=""
  case $status in
    0 | 5) ;;  # 5: everything in this stage was left out
    124) note=", ended at the limit of $limit s"; bad=$((bad + 1)) ;;
    *) bad=$(( bad > 0 ? bad : 1 )) ;;
  esac
  failed=$((failed + bad))
  report+="  $stage: $((SECONDS - start)) s$note"$'\n'
done

echo "== stages, $((SECONDS - begin)) s in all"
printf '%s' "$report"
echo "$passed passed, $failed failed, $skipped skipped"
(( failed == 0 && passed > 0 ))
