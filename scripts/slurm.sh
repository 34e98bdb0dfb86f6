#!/bin/bash
# A LLaMA fine-tuned on several machines under Slurm. Submit with: sbatch --nodes=2 scripts/slurm.sh --model DIR ...
# What follows the script's name goes to engine.finetune; --out must be on a file system that all machines see.
#SBATCH --job-name=cria
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# srun passes Slurm's SIGTERM on, 120 s before the job's end: torchrun hands it to its ranks, which save and stop. A
# requeued job gives the same command again, and so goes on.
exec srun torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" --max-restarts=3 \
  -m engine.finetune "$@"
