#!/usr/bin/env bash
# Make the environment where there is none, and use it.
#
#   source tools/env.sh            (bash) afterwards python, pytest, ruff and megatron-jackpot are its own
#   bash tools/env.sh              make it and print its folder
#
# It lies in $JACKPOT_HOME/env-KEY, by default below ~/.cache/megatron-jackpot. KEY is the hash of the pins,
# the interpreter and whether there is CUDA, so every clone with the same pins shares one.
#   JACKPOT_PYTHON        the interpreter to use (3.11 or 3.12)
#   JACKPOT_TORCH_INDEX   a package index that has torch's CPU build, asked where pip's own settings have none

export JACKPOT_HOME="${JACKPOT_HOME:-$HOME/.cache/megatron-jackpot}"
JACKPOT_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
  JACKPOT_ENV=$(bash "${BASH_SOURCE[0]}") || return 1
  export JACKPOT_ENV PATH="$JACKPOT_ENV/bin:$PATH" PYTHONPATH="$JACKPOT_REPO${PYTHONPATH:+:$PYTHONPATH}"
  return 0
fi
set -euo pipefail
TORCHVISION_FIX="$JACKPOT_REPO/megatron_jackpot/servers/cpu_server/sitecustomize.py"

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

# PHASE COMMAND...: run it with its output in $log, a line of progress every 10 s, and the seconds at the end.
phase() {
  local phase="$1" start=$SECONDS next=10 offset child doing status=0
  local steps='(Collecting|Downloading|Building|Installing)[^,;(]{,60}'
  shift
  offset=$(wc -c <"$log")
  "$@" >>"$log" 2>&1 9>&- &
  child=$!
  trap 'kill $child 2>/dev/null; wait $child; exit 130' INT TERM HUP
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.5
    if (( SECONDS - start >= next )); then
      doing=$(tail -c "+$((offset + 1))" "$log" | grep -aoE "$steps" | tail -n 1 || true)
      say "$phase: $((SECONDS - start)) s, $(du -sm "$folder" | cut -f1) MB on disk${doing:+, $doing}"
      next=$((next + 10))
    fi
  done
  wait "$child" || status=$?
  trap - INT TERM HUP
  if (( status == 0 )); then say "$phase: done in $((SECONDS - start)) s"; fi
  return "$status"
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
    phase "torch $version (CUDA)" "$1" -m pip install --progress-bar off "torch==$version" && return
    failed "torch"
  fi
  phase "torch $version+cpu" "$1" -m pip install --progress-bar off --no-deps "torch==$version+cpu" && return
  if [[ -n ${JACKPOT_TORCH_INDEX:-} ]]; then
    phase "torch $version+cpu from JACKPOT_TORCH_INDEX" "$1" -m pip install --progress-bar off --no-deps \
      --index-url "$JACKPOT_TORCH_INDEX" "torch==$version+cpu" && return
    failed "torch's CPU build from JACKPOT_TORCH_INDEX"
  fi
  if unreachable; then failed "torch"; fi
  say "pip found no CPU build of torch $version. JACKPOT_TORCH_INDEX=URL names an index that has it."
  say "Falling back to pip's default build: several GB with its CUDA packages. It also runs without a GPU."
  phase "torch $version (default build)" "$1" -m pip install --progress-bar off "torch==$version" && return
  failed "torch"
}

install_pins() {  # PYTHON: the pinned list, less what this machine cannot or need not have
  local pins="$folder/pins.txt" site header
  site="$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
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
  phase "$(grep -c '==' "$pins") pinned packages" \
    "$1" -m pip install --progress-bar off --no-deps -r "$pins" || failed "requirements/cpu.txt"
  # transformers' model classes import torchvision: every process here needs what the servers need.
  cp "$TORCHVISION_FIX" "$site/torchvision_on_cpu.py"
  echo 'import torchvision_on_cpu' >"$site/torchvision_on_cpu.pth"
}

build() {  # INTERPRETER: an environment cannot move, so it is built in place and `ready` is written last
  local free command="$folder/bin/megatron-jackpot" start=$SECONDS
  local imports='import torch, megatron.core, reasoning_gym; from transformers import Qwen3ForCausalLM'
  free=$(df -Pk "$JACKPOT_HOME" | awk 'NR == 2 {print int($4 / 1048576)}')
  if (( free < 6 )); then
    die "$free GB are free under $JACKPOT_HOME, the environment needs 6." \
      "Free some, or choose another place with JACKPOT_HOME=/path."
  fi
  rm -rf "$folder"; : >"$log"
  say "Making $folder ($kind, a few minutes; log: $log)"
  phase "venv" "$1" -m venv "$folder" || die "python -m venv failed." "Log: $log"
  install_torch "$folder/bin/python"
  install_pins "$folder/bin/python"
  phase "check" "$folder/bin/python" -W ignore -c "$imports" ||
    { tail -n 5 "$log" >&2; die "the new environment does not import: see the lines above." "Log: $log"; }
  # The package itself is found through PYTHONPATH, so that clones can share the environment.
  printf '#!/bin/sh\nexec "%s/bin/python" -m megatron_jackpot.cli "$@"\n' "$folder" >"$command"
  chmod +x "$command"
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
exec 9>"$folder.lock"
flock -n 9 || { say "Another command is making $folder: waiting for it."; flock 9; }
if [[ ! -f $folder/ready ]] || ! "$folder/bin/python" -c '' 2>/dev/null; then build "$interpreter"; fi
printf '%s\n' "$folder"
