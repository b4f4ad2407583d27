# Sourced by what runs the quickstart seed by seed, with its words FOLDER [SEED ...] [key=value ...] and its own
# `seeds`, which count where none is named: sets out, seeds, overrides, models, and enters the clone's environment.
[[ $# -ge 1 ]] || { echo "usage: bash $0 FOLDER [SEED ...] [key=value ...]" >&2; exit 2; }
out=$1 named=() overrides=()
for word in "${@:2}"; do
  if [[ $word == *=* ]]; then overrides+=("$word"); else named+=("$word"); fi
done
(( ${#named[@]} == 0 )) || seeds=("${named[@]}")
source tools/env.sh
models=$(python examples/quickstart/shipped.py)
