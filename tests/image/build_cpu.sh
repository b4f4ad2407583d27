#!/usr/bin/env bash
# The Dockerfile's cpu target, really built without a Docker engine (buildah, chroot), and what must work inside it:
# doctor, two quickstart steps, tests/unit. On Debian, as root; FOLDER takes about 25 GB for the time of the build.
#
#   bash tests/image/build_cpu.sh FOLDER
#
# The base image is made by debootstrap from this machine's mirror, since there may be no registry; pip's settings and
# the certificates of this machine are mounted for the build alone. A second call goes on with the image of the first.
set -euo pipefail
work=$(realpath -m "${1:?usage: bash tests/image/build_cpu.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot TMPDIR="$work"
box=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
image=localhost/megatron-jackpot:cpu
begin=$SECONDS

say() { printf '[image test] %s %4d s  %s\n' "$(date +%H:%M:%S)" $((SECONDS - begin)) "$*"; }

pip_settings() {  # this machine's, with the certificates' place in the build; folders that serve as indices are mounted
  local key value word
  printf '[global]\ncert = /hostcerts/ca-certificates.crt\n' >"$work/pip.conf"
  mounts=(-v /etc/ssl/certs:/hostcerts:ro -v "$work/pip.conf:/etc/pip.conf:ro")
  for key in index-url extra-index-url find-links; do
    value=$(pip config get "global.$key" 2>/dev/null) || continue
    printf '%s = %s\n' "$key" "$value" >>"$work/pip.conf"
    for word in $value; do
      word=${word#file://}
      # The files lie beside the folder of names.
      word=${word%/simple}
      if [[ $word == /* && -d $word ]]; then mounts+=(-v "$word:$word:ro"); fi
    done
  done
}

if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
  say "installing buildah and debootstrap"
  apt-get update -q >"$work/apt.log" 2>&1
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends buildah debootstrap >>"$work/apt.log" 2>&1
fi

if ! "${box[@]}" inspect localhost/debian:bookworm >/dev/null 2>&1; then
  say "making the base image"
  debootstrap --variant=minbase bookworm "$work/rootfs" >"$work/debootstrap.log"
  base=$("${box[@]}" from scratch)
  "${box[@]}" add -q "$base" "$work/rootfs" / >/dev/null
  "${box[@]}" config --cmd /bin/bash "$base"
  "${box[@]}" commit -q --rm "$base" localhost/debian:bookworm >/dev/null
  rm -rf "$work/rootfs"
fi

if ! "${box[@]}" inspect "$image" >/dev/null 2>&1; then
  say "building"
  pip_settings
  "${box[@]}" bud --network host --layers=false --target cpu --build-arg CPU_BASE_IMAGE=localhost/debian:bookworm \
    --build-arg "REVISION=$(git rev-parse HEAD)" ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
    "${mounts[@]}" -t "$image" . >"$work/build.log" 2>&1 || { tail -n 30 "$work/build.log"; exit 1; }
  say "built: $(grep -o 'pins.*' "$work/build.log" | tail -n 1)"
fi

box_run() {  # LOG SECONDS COMMAND...: in a container of its own, as the image's user
  local log=$1 limit=$2 container code=0
  shift 2
  container=$("${box[@]}" from "$image")
  # Under chroot buildah looks for a command in this machine's PATH: the image's own shell looks in the image's.
  # shellcheck disable=SC2016
  timeout "$limit" "${box[@]}" run --user 1000 "$container" -- \
    /bin/sh -c 'exec "$@"' sh "$@" >"$work/$log.log" 2>&1 || code=$?
  "${box[@]}" rm "$container" >/dev/null
  (( code == 0 )) || { tail -n 30 "$work/$log.log"; say "FAILED with code $code: $*"; exit 1; }
}

say "doctor"
box_run doctor 300 megatron-jackpot doctor
say "two quickstart steps"
box_run quickstart 900 bash examples/quickstart/run.sh run.folder=/tmp/run run.steps=2 evaluation.size=64
grep 'step 2/2' "$work/quickstart.log"
say "tests/unit"
box_run unit 1800 python -m pytest -q -p no:cacheprovider tests/unit
tail -n 1 "$work/unit.log"
say "passed"
