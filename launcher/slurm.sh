#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
# sbatch launcher/slurm.sh --deepspeed_config FILE [KEY=VALUE …], from the repository: srun starts one rank per task.
# Slurm's SIGTERM two minutes before the limit saves a checkpoint; the requeued job resumes from it. With --array=1-9%1
# nine jobs run one after another: each resumes where the previous one ended, however it ended.
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# A rank's main thread, NCCL, gloo and the thread that writes checkpoints share a core unless srun is told to give more.
cores=$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))
exec srun --cpus-per-task="$((cores > 0 ? cores : 1))" --kill-on-bad-exit=1 .venv/bin/python -u launcher/pretrain.py "$@"
