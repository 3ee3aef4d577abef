#!/bin/bash
# Two nodes of eight GPUs: sbatch recipes/launch/slurm.sh recipe.yaml training.sharding=fsdp2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
# Five minutes before the time limit the run is told to stop, and leaves a checkpoint.

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# SLURM_NTASKS counts nodes here: one torchrun on each starts a process for every GPU.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$host:29500" \
    -m customized_grpo train "$@"
