#!/usr/bin/env bash
# Samples a checkpoint, and scores the samples if there is a reference:
#   bash script/eval.sh CKPT REF.npz [flags of generate.py]
set -euo pipefail
cd "$(dirname "$0")/.."

CKPT=${1:?usage: bash script/eval.sh CKPT REF.npz [flags of generate.py]}
REF=${2:?usage: bash script/eval.sh CKPT REF.npz [flags of generate.py]}
shift 2

samples=$(bash script/launch.sh generate.py --ckpt "$CKPT" "$@" | tee >(cat >&2) | sed -n 's/^samples: //p')
if [ ! -e "$REF" ]; then
  echo "no reference batch at $REF: samples are not scored (set REF=/path/to/reference.npz)"
  exit 0
fi
exec python evaluate.py "$REF" "$samples" --json "${samples%.npz}-metrics.json"
