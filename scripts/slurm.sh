#!/bin/bash
# A LLaMA fine-tuned on several machines under Slurm. Submit with: sbatch --nodes=2 scripts/slurm.sh --model DIR ...
# What follows the script's name goes to engine.finetune; --out must be on a file system that all machines see.
#SBATCH --job-name=cria
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((10000 + SLURM_JOB_ID % 20000)) # jobs may share a machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that torchrun gives ranks to save; always 30 before torch 2.12

# --max-restarts is for machines and ranks that die; it also repeats, in vain, a run that ends for its flags or its data.
# A torchrun a machine, started by srun without what it may be set to: one CPU a task, and an end of all tasks with the
# first, whose ranks have saved their part while others still write.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="${nodes[0]}:$port" --max-restarts=3 \
  -m engine.finetune "$@" &
run=$!

# Slurm requeues what it preempts or loses with a machine, not what reaches its time limit. 300 s before, it signals
# this script alone: srun passes SIGTERM on to torchrun, torchrun to its ranks, which save and stop; the same command
# then goes on. An scancel, which sends other signals, ends the job.
stop_and_requeue() {
  kill -TERM "$run"
  wait "$run" || scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap stop_and_requeue USR1
wait "$run"
