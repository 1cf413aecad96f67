#!/usr/bin/env bash
# DeepFlow-L/2-2T on ImageNet at 256 px with the paper's settings: 400k steps are its 80 epochs.
# The same command resumes. Further flags pass through and win: bash script/large/train.sh --tg-upper-bound 0.02
set -euo pipefail
cd "$(dirname "$0")/../.."

EXP_NAME=${EXP_NAME:-large-2t}
MODEL="DeepFlow-L/2"
TRANS_DEPTH=24
DF_IDXS="[12]"

source script/recipe.sh  # data, output, and the settings that all sizes share
