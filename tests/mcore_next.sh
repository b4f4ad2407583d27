#!/usr/bin/env bash
# tests/unit and tests/parallel on Python 3.12 with the megatron-core of the [gpu] extra.
#
#   bash tests/mcore_next.sh [pytest arguments]
#
# The pinned environment for Python 3.12 (tools/env.sh; JACKPOT_PYTHON names another interpreter of that version)
# with the newer megatron-core in a folder in front of it. Ends within an hour, or JACKPOT_TEST_LIMIT_S.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JACKPOT_PYTHON="${JACKPOT_PYTHON:-python3.12}"
source tools/env.sh

version=$(sed -n 's/.*"megatron-core==\([0-9.]*\)".*/\1/p' setup.py)
newer="$JACKPOT_ENV-megatron-core-$version"
if [[ ! -f $newer/ready ]]; then
  rm -rf "$newer"
  python -m pip install --quiet --no-deps --target "$newer" "megatron-core==$version"
  touch "$newer/ready"
fi

export PYTHONPATH="$newer:$PYTHONPATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
python -W ignore - "$version" <<'PYTHON'
import sys

import megatron.core
import torch

python = ".".join(map(str, sys.version_info[:3]))
print(f"Python {python}, megatron-core {megatron.core.__version__}, torch {torch.__version__}")
wanted = ((3, 12), sys.argv[1])
if (sys.version_info[:2], megatron.core.__version__) != wanted:
    sys.exit(f"tests/mcore_next.sh: wanted Python and megatron-core {wanted}, found the above")
PYTHON
timeout --foreground --signal=INT --kill-after=60 "${JACKPOT_TEST_LIMIT_S:-3600}" \
  python -m pytest tests/unit tests/parallel "$@"
