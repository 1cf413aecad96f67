# The paper's training settings for every size. Sourced by script/SIZE/train.sh, which sets EXP_NAME, MODEL, TRANS_DEPTH
# and DF_IDXS. An edit here is for all sizes; a flag given to train.sh comes last and wins.
DATA_DIR=${DATA_DIR:-data/imagenet256-latents}
OUTPUT_DIR=${OUTPUT_DIR:-runs}

exec bash script/launch.sh train.py \
  --data-dir "$DATA_DIR" \
  --output-dir "$OUTPUT_DIR" \
  --exp-name "$EXP_NAME" \
  --model "$MODEL" \
  --trans-depth "$TRANS_DEPTH" \
  --df-idxs "$DF_IDXS" \
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
