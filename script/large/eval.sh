#!/usr/bin/env bash
# 50,000 samples of DeepFlow-L/2-2T by the paper's sampler (SDE, 250 steps), then the ADM metrics if REF is there.
# Further flags go to generate.py: CKPT=... REF=... bash script/large/eval.sh --cfg-scale 1.325
set -euo pipefail
cd "$(dirname "$0")/../.."

CKPT=${CKPT:-runs/large-2t/ema.safetensors}
REF=${REF:-data/VIRTUAL_imagenet256_labeled.npz}

exec bash script/eval.sh "$CKPT" "$REF" --mode sde --num-steps 250 --num-fid-samples 50000 "$@"
