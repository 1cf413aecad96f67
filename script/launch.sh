#!/usr/bin/env bash
# Runs a program of this repository on all GPUs of this machine (one process each), or in one process without any:
#   bash script/launch.sh train.py --model DeepFlow-B/2 ...
# GPUS=2 takes that many. For several machines, call `accelerate launch` with your own configuration.
set -euo pipefail

GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if [ "$GPUS" -gt 1 ]; then
  exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$GPUS" \
    --mixed_precision no --dynamo_backend no "$@"
fi
exec python "$@"
