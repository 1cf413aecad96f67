#!/usr/bin/env bash
# The main job on real images, small: trains a DeepFlow-2T and the SiT of equal depth on 1,898 emoji (64 px, nine
# classes), samples both, scores both, and prints one table. Needs Python 3.10 or newer and a package index; a GPU is
# used when present. Works in the active virtual environment, or in .venv. Run again, it skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=${STEPS:-1200}      # optimizer steps of each model
SAMPLES=${SAMPLES:-949}   # images of each model: half of the data, as many as the real images compared in the last row
DATA=data/demo
RUNS=runs/quickstart
RESULTS=samples/quickstart

TRAIN="--data-dir $DATA/latents --output-dir $RUNS --batch-size 64 --learning-rate 1e-3 --lr-schedule cosine
       --ema-decay 0.995 --log-every 20 --checkpointing-steps 500 --num-workers 0 --seed 0"
SAMPLE="--num-fid-samples $SAMPLES --per-proc-batch-size 128 --classes data --mode ode --heun --num-steps 12
        --cfg-scale 2 --sample-dir $RESULTS --global-seed 0 --overwrite"

# Threads that wait sleep rather than spin: spinning makes a step ten times slower when anything else uses a core.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

source script/environment.sh
if [ -n "${VIRTUAL_ENV:-}" ]; then
  install_requirements requirements-demo.txt
else
  make_environment .venv requirements-demo.txt
fi

echo "== data: emoji -> latents"
python -m preprocessing.demo_data --dest $DATA/images
python -m preprocessing.dataset_tools encode --source $DATA/images --dest $DATA/latents --vae assets/demo_vae
for part in "reference.npz 1 0" "half-a.npz 2 0" "half-b.npz 2 1"; do
  set -- $part  # file, every how many-th image, from which on
  [ -e $DATA/$1 ] || python -m preprocessing.dataset_tools stats --source $DATA/images --dest $DATA/$1 --every $2 --first $3
done

echo "== training: SiT and DeepFlow, $STEPS steps each"
python train.py $TRAIN --exp-name untrained --model DeepFlow-Tiny/2 --max-train-steps 0
python train.py $TRAIN --exp-name sit --model SiT-Tiny/2 --max-train-steps "$STEPS"
python train.py $TRAIN --exp-name deepflow --model DeepFlow-Tiny/2-2T --max-train-steps "$STEPS"

echo "== sampling and scoring"
for run in untrained sit deepflow; do
  python generate.py $SAMPLE --ckpt $RUNS/$run/ema.safetensors --name $run
  python evaluate.py $DATA/reference.npz $RESULTS/$run.npz --features demo --json $RESULTS/$run-metrics.json
done
python evaluate.py $DATA/half-a.npz $DATA/half-b.npz --features demo --json $RESULTS/real-metrics.json

python -m script.quickstart_report --runs $RUNS --results $RESULTS
