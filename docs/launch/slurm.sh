#!/bin/bash
#SBATCH --job-name=igpt --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00
#SBATCH --signal=TERM@120 --requeue --open-mode=append --output=%x-%j.log
#
# Four machines of eight GPUs under SLURM, one task for each GPU:
#
#     sbatch docs/launch/slurm.sh
#
# Two minutes before the time limit every task gets SIGTERM; the run saves, ends with code 75 and is queued again.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 .venv/bin/python train.py \
  --config=configs/imagenet.py:l --config.data.source=tokens:"$SCRATCH"/imagenet-32 \
  --workdir="$SCRATCH"/l --config.mesh.fsdp=8
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
