#!/usr/bin/env bash
# Runs a program of this repository on all GPUs of this machine (one process each), or in one process without any:
#   bash script/launch.sh train.py --model DeepFlow-B/2 ...
# GPUS=2 takes that many. ACCELERATE_CONFIG=FILE launches by an Accelerate configuration instead (script/accelerate/ has
# examples), LAUNCH="..." gives `accelerate launch` further flags. Inside torchrun or SLURM (WORLD_SIZE is set) it runs
# the one process that is wanted of it.
set -euo pipefail

if [ -n "${WORLD_SIZE:-}" ]; then
  exec python "$@"
fi
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  exec accelerate launch --config_file "$ACCELERATE_CONFIG" ${LAUNCH:-} "$@"
fi
GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if [ "$GPUS" -gt 1 ]; then
  exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$GPUS" \
    --mixed_precision no --dynamo_backend no ${LAUNCH:-} "$@"
fi
exec python "$@"
