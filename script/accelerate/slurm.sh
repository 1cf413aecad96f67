#!/usr/bin/env bash
# Two machines of eight GPUs under SLURM: sbatch script/accelerate/slurm.sh, from the repository's root. Data and runs lie
# on a disk that both see. Five minutes before the time is up SLURM sends SIGUSR1 to all processes: the run saves and
# ends with 143, and the job is queued again.
#SBATCH --job-name=deepflow-xl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -uo pipefail

export MASTER_ADDR MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One task a GPU, and no launcher between SLURM and train.py: a launcher would end the run on the signal.
# From SLURM 22.05 on srun does not take over the job's own --cpus-per-task.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec bash script/xlarge/train.sh "$@"' train "$@"
code=$?
[ "$code" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
