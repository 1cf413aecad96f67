#!/usr/bin/env bash
# DeepFlow-B/2-2T on ImageNet at 256 px with the paper's settings: 400k steps are its 80 epochs.
# The same command resumes. Further flags pass through and win: bash script/base/train.sh --tg-upper-bound 0.02
set -euo pipefail
cd "$(dirname "$0")/../.."

EXP_NAME=${EXP_NAME:-base-2t}
MODEL="DeepFlow-B/2"
TRANS_DEPTH=12
DF_IDXS="[6]"

source script/recipe.sh  # data, output, and the settings that all sizes share
