#!/usr/bin/env bash
# Make the environment where there is none, and use it.
#
#   source tools/env.sh            (bash) afterwards python, pytest, ruff and megatron-jackpot are its own, anywhere
#   bash tools/env.sh              make it and print its folder
#
# It lies in $JACKPOT_HOME/env-KEY, by default below ~/.cache/megatron-jackpot. KEY is the hash of the pins,
# the interpreter and whether there is CUDA, so every clone with the same pins shares one. uv installs where it is
# there or pip can fetch it, told pip's own settings; where it cannot, pip does.
#   JACKPOT_PYTHON        the interpreter to use (3.11 or 3.12)
#   JACKPOT_INSTALLER     pip: do without uv
#   JACKPOT_TORCH_INDEX   a package index that has torch's CPU build, asked where pip's own settings have none

export JACKPOT_HOME="${JACKPOT_HOME:-$HOME/.cache/megatron-jackpot}"
JACKPOT_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
  JACKPOT_ENV=$(bash "${BASH_SOURCE[0]}") || return 1
  export JACKPOT_ENV PATH="$JACKPOT_ENV/bin:$PATH" PYTHONPATH="$JACKPOT_REPO${PYTHONPATH:+:$PYTHONPATH}"
  return 0
fi
set -euo pipefail
TORCHVISION_FIX="$JACKPOT_REPO/megatron_jackpot/servers/cpu_server/torchvision_operators.py"
UV_VERSION=0.13.9

say() { printf '[env] %s\n' "$*" >&2; }
die() { printf '[env] ERROR: %s\n' "$@" >&2; exit 1; }

usable() {  # INTERPRETER: is it one the pins are made for, able to make an environment?
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_interpreter() {
  local candidate
  for candidate in ${JACKPOT_PYTHON:-python3.11 python3.12 python3}; do
    if usable "$candidate"; then command -v "$candidate"; return; fi
  done
  die "no usable Python among: ${JACKPOT_PYTHON:-python3.11 python3.12 python3}." \
    "Needed: Python 3.11 or 3.12 with its venv module (Debian, Ubuntu: apt-get install python3-venv)." \
    "Name another interpreter with JACKPOT_PYTHON=/path/to/python3.11."
}

# PHASE COMMAND...: run it with its output in $log, a line of progress every 10 s, and the seconds at the end,
# those of an installation's downloads apart.
phase() {
  local phase="$1" start=$SECONDS next=10 offset child collected="" status=0
  shift
  offset=$(wc -c <"$log")
  "$@" >>"$log" 2>&1 9>&- &
  child=$!
  trap 'kill $child 2>/dev/null; wait $child; exit 130' INT TERM HUP
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.5
    if [[ -z $collected ]] && placing; then collected=$((SECONDS - start)); fi
    if (( SECONDS - start >= next )); then
      say "$phase: $((SECONDS - start)) s, $(du -sm "$folder" | cut -f1) MB on disk$(doing)"
      next=$((next + 10))
    fi
  done
  wait "$child" || status=$?
  trap - INT TERM HUP
  if (( status == 0 )); then say "$phase: done in $((SECONDS - start)) s$(done_apart)"; fi
  return "$status"
}

# Of the phase that calls them: its log; whether pip or uv has all files and puts them in place; the megabytes
# they say they download (uv is silent about files below 1 MB).
said() { tail -c "+$((offset + 1))" "$log"; }
placing() { said | grep -aqE '^(Installing collected|Prepared)'; }
downloaded() {
  said | grep -aoE 'Downloading [^(]*\([0-9.]+ ?[kMG]i?B\)' | sed -E 's/.*\(([0-9.]+) ?([kMG]).*/\1 \2/' |
    awk '{mb += $1 * ($2 == "G" ? 1000 : $2 == "M" ? 1 : 0.001)} END {printf "%.0f MB downloaded", mb}'
}
doing() {
  if [[ -n $collected ]]; then printf ', putting files in place'
  elif said | grep -aqE '(Collecting|Downloading|Processing) '; then printf ', %s' "$(downloaded)"; fi
}
done_apart() {
  if placing; then
    collected=${collected:-$((SECONDS - start))}
    printf ': %s in %s s, put in place in %s s' "$(downloaded)" "$collected" "$((SECONDS - start - collected))"
  fi
}

# PYTHON: sets `uv` where it can be used, and gives it pip's settings, which it does not read itself.
find_uv() {
  local python="$1" settings
  uv="" extra_indices=""
  if [[ ${JACKPOT_INSTALLER:-} == pip ]]; then return; fi
  if ! uv=$(command -v uv); then
    phase "uv" "$python" -m pip install --progress-bar off --no-deps "uv==$UV_VERSION" || return 0
    uv="$folder/bin/uv"
  fi
  if ! "$uv" --version >>"$log" 2>&1; then uv=""; return; fi
  settings=$("$python" -m pip config list 2>/dev/null) || return 0
  export UV_INDEX_STRATEGY=unsafe-best-match  # as pip: of all indices
  tell_uv UV_DEFAULT_INDEX "$(setting index-url)"
  extra_indices=$(setting extra-index-url)
  tell_uv UV_FIND_LINKS "$(setting find-links | tr ' ' ',')"
  tell_uv SSL_CERT_FILE "$(setting cert)"
  tell_uv UV_NO_CACHE "$(setting no-cache-dir)"
}

tell_uv() {  # NAME VALUE: unless the environment says it already, or there is nothing to say
  if [[ -n $2 && -z ${!1:-} ]]; then export "$1=$2"; fi
}

setting() {  # NAME: what pip's environment and files say, in pip's order of precedence
  local scope value
  for scope in :env: install global; do
    value=$(sed -nE "s/^${scope}\\.$1='(.*)'\$/\\1/p" <<<"$settings")
    if [[ -n $value ]]; then printf '%s' "$value"; return; fi
  done
}

# The pins come from the default index alone: of one version uv takes the first index's files and leaves the others'
# unseen, and an extra one may have but a part of them. torch's CPU build is on extra ones.
install_with_extras() { UV_INDEX="${UV_INDEX:-$extra_indices}" install "$@"; }

# PHASE PYTHON ARGUMENTS...: an installation, by uv and, should that fail, by pip. Byte code is made when it is
# first needed: all of it would take two minutes of a core, what the check needs a quarter of that.
install() {
  local what="$1" python="$2"
  shift 2
  if [[ -n $uv ]]; then
    phase "$what" "$uv" pip install --python "$python" "$@" && return
    say "$what: uv could not, pip tries."
  fi
  phase "$what" "$python" -m pip install --progress-bar off --no-compile "$@"
}

unreachable() {  # did pip fail for want of an index, not of a package?
  local signs='Retrying \(Retry|NewConnectionError|Name or service not known|Temporary failure in name'
  grep -qE "$signs|ReadTimeout|ProxyError|SSLError" "$log"
}

failed() {  # WHAT
  tail -n 15 "$log" >&2
  if unreachable; then
    die "$1: pip could not reach a package index." \
      "Check the network, or name a reachable index in pip's own settings (pip config, PIP_INDEX_URL)." \
      "Log: $log"
  fi
  die "$1: pip failed; its last lines are above." "Log: $log"
}

install_torch() {  # PYTHON
  local version
  version="$(sed -n 's/^torch==//p' "$JACKPOT_REPO/requirements/cpu.txt")"
  if [[ $kind == cuda ]]; then
    install "torch $version (CUDA)" "$1" "torch==$version" && return
    failed "torch"
  fi
  install_with_extras "torch $version+cpu" "$1" --no-deps "torch==$version+cpu" && return
  if [[ -n ${JACKPOT_TORCH_INDEX:-} ]]; then
    install "torch $version+cpu from JACKPOT_TORCH_INDEX" "$1" --no-deps \
      --index-url "$JACKPOT_TORCH_INDEX" "torch==$version+cpu" && return
    failed "torch's CPU build from JACKPOT_TORCH_INDEX"
  fi
  if unreachable; then failed "torch"; fi
  say "pip found no CPU build of torch $version. JACKPOT_TORCH_INDEX=URL names an index that has it."
  say "Falling back to pip's default build: several GB with its CUDA packages. It also runs without a GPU."
  install "torch $version (default build)" "$1" "torch==$version" && return
  failed "torch"
}

site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }  # PYTHON

install_pins() {  # PYTHON: the pinned list, less what this machine cannot or need not have
  local pins="$folder/pins.txt" site header
  site="$(site_of "$1")"
  header="$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
  cp "$JACKPOT_REPO/requirements/cpu.txt" "$pins"
  # A CUDA build of torch has brought the triton it needs.
  if [[ -d $site/triton ]]; then sed -i '/^triton==/d' "$pins"; fi
  if ! command -v cc >/dev/null || [[ ! -f $header ]]; then
    say "No C compiler or Python headers: leaving out pycosat, which only reasoning-gym's zebra puzzles use."
    printf 'def itersolve(*args, **kwargs):\n    raise RuntimeError("pycosat needs a C compiler")\n' \
      >"$site/pycosat.py"
    sed -i '/^pycosat==/d' "$pins"
  fi
  install "$(grep -c '==' "$pins") pinned packages" "$1" --no-deps -r "$pins" || failed "requirements/cpu.txt"
  # transformers' model classes import torchvision: every process here needs what the servers need.
  cp "$TORCHVISION_FIX" "$site/torchvision_on_cpu.py"
  echo 'import torchvision_on_cpu' >"$site/torchvision_on_cpu.pth"
}

check() {  # PYTHON: what trainer and server import, side by side; their byte code is kept whatever is set
  local server=0 trainer=0
  local lazily="${PYTHONDONTWRITEBYTECODE:-}"
  unset PYTHONDONTWRITEBYTECODE
  local imports='import torch, megatron.core.models.gpt, reasoning_gym; from transformers import Qwen3ForCausalLM'
  if [[ $kind == cpu ]]; then
    PYTHONPATH="${TORCHVISION_FIX%/*}" SGLANG_USE_CPU_ENGINE=1 \
      "$1" -W ignore -c 'import sglang.launch_server, sglang.srt.entrypoints.http_server' &
    server=$!
  fi
  "$1" -W ignore -c "$imports" || trainer=1
  if (( server )); then wait "$server" || trainer=1; fi
  # Where no process may keep byte code later, each would compile what it imports anew. Some files are for Python 2.
  if [[ -n $lazily ]]; then "$1" -W ignore -m compileall -q -j 0 "$(site_of "$1")" || true; fi
  return "$trainer"
}

build() {  # INTERPRETER: an environment cannot move, so it is built in place and `ready` is written last
  local free start=$SECONDS
  free=$(df -Pk "$JACKPOT_HOME" | awk 'NR == 2 {print int($4 / 1048576)}')
  if (( free < 6 )); then
    die "$free GB are free under $JACKPOT_HOME, the environment needs 6." \
      "Free some, or choose another place with JACKPOT_HOME=/path."
  fi
  rm -f "$folder/ready"; rm -rf "$folder"; : >"$log"
  say "Making $folder ($kind, a few minutes; log: $log)"
  phase "venv" "$1" -m venv "$folder" || die "python -m venv failed." "Log: $log"
  find_uv "$folder/bin/python"
  install_torch "$folder/bin/python"
  install_pins "$folder/bin/python"
  phase "check, and its byte code" check "$folder/bin/python" ||
    { tail -n 5 "$log" >&2; die "the new environment does not import: see the lines above." "Log: $log"; }
  # The package itself is found through PYTHONPATH, so that clones can share the environment.
  printf '#!/bin/sh\nexec "%s/bin/python" -m megatron_jackpot.cli "$@"\n' "$folder" >"$folder/bin/megatron-jackpot"
  chmod +x "$folder/bin/megatron-jackpot"
  touch "$folder/ready"
  say "Ready in $((SECONDS - start)) s, $(du -sh "$folder" | cut -f1)"
}

kind=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then kind=cuda; fi
interpreter=$(find_interpreter)
key=$( { cat "$JACKPOT_REPO/requirements/cpu.txt" "$TORCHVISION_FIX"; echo "$kind"
  "$interpreter" -c 'import platform, sys; print(sys.version, sys.base_prefix, platform.machine())'; } |
  sha256sum | cut -c1-12)
folder="$JACKPOT_HOME/env-$key"
log="$folder.log"
mkdir -p "$JACKPOT_HOME" 2>/dev/null && [[ -w $JACKPOT_HOME ]] ||
  die "cannot write to $JACKPOT_HOME." "Choose another place with JACKPOT_HOME=/path."
command -v flock >/dev/null || die "the program flock is missing (package util-linux)."
is_ready() { [[ -f $folder/ready ]] && "$folder/bin/python" -c '' 2>/dev/null; }
if is_ready; then printf '%s\n' "$folder"; exit; fi
exec 9>"$folder.lock"
flock -n 9 || { say "Another command is making $folder: waiting for it."; flock 9; }
if ! is_ready; then build "$interpreter"; fi
printf '%s\n' "$folder"
