#!/usr/bin/env bash
# Samples a checkpoint, and scores the samples if there is a reference:
#   bash script/eval.sh CKPT REF.npz [flags of generate.py]
# EVAL_FLAGS="--inception-weights FILE --cache DIR" are flags of evaluate.py. After an interruption, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."

CKPT=${1:?usage: bash script/eval.sh CKPT REF.npz [flags of generate.py]}
REF=${2:?usage: bash script/eval.sh CKPT REF.npz [flags of generate.py]}
shift 2

if [ ! -e "$CKPT" ]; then
  echo "error: no checkpoint at $CKPT: set CKPT=/path/to/ema.safetensors, or to an official .pt" >&2
  exit 2
fi
[ -e "$REF" ] || echo "no reference batch at $REF: samples will not be scored (set REF=/path/to/reference.npz)"

# A pipe fails with any of its programs (pipefail), and with it this script (-e).
samples=$(bash script/launch.sh generate.py --ckpt "$CKPT" "$@" | tee >(cat >&2) | sed -n 's/^samples: //p')
[ -e "$REF" ] || exit 0
exec bash script/launch.sh evaluate.py "$REF" "$samples" --json "${samples%.npz}-metrics.json" ${EVAL_FLAGS:-}
