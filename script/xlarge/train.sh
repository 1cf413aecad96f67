#!/usr/bin/env bash
# DeepFlow-XL/2-3T on ImageNet at 256 px with the paper's settings: 400k steps are its 80 epochs.
# The same command resumes. Further flags pass through and win: bash script/xlarge/train.sh --tg-upper-bound 0.02
set -euo pipefail
cd "$(dirname "$0")/../.."

DATA_DIR=${DATA_DIR:-data/imagenet256-latents}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
EXP_NAME=${EXP_NAME:-xlarge-3t}

exec bash script/launch.sh train.py \
  --data-dir "$DATA_DIR" \
  --output-dir "$OUTPUT_DIR" \
  --exp-name "$EXP_NAME" \
  --model "DeepFlow-XL/2" \
  --trans-depth 24 \
  --df-idxs "[8, 16]" \
  --batch-size 256 \
  --max-train-steps 400000 \
  --checkpointing-steps 50000 \
  --learning-rate 1e-4 \
  --max-grad-norm 1.0 \
  --path-type linear \
  --prediction v \
  --weighting lognormal \
  --cfg-prob 0.1 \
  --tg-upper-bound 0.01 \
  --acc-coeff 1.0 \
  --seed 0 \
  "$@"
