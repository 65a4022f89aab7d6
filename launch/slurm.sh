#!/usr/bin/env bash
# One run over the nodes of a SLURM allocation, a process a node; JAX finds the others by itself.
#
#   sbatch --nodes=4 launch/slurm.sh luthier train --config=… --workdir=/shared/run
#   bash launch/slurm.sh --dry_run luthier train …
#
# Give partition, account and time on the command line of sbatch. Before the time is up SLURM sends SIGTERM: the
# run saves, exits with 75, and is queued again. LUTHIER_VENV names the environment, on a file system all nodes see.
#SBATCH --job-name=luthier
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=luthier-%j.log
#SBATCH --open-mode=append
set -euo pipefail

dry_run=""
if [[ "${1:-}" == "--dry_run" ]]; then dry_run="echo"; shift; fi
if (($# == 0)); then echo "launch/slurm.sh: error: give the command to run" >&2; exit 2; fi
if [[ -z "$dry_run" && -z "${SLURM_JOB_ID:-}" ]]; then
  echo "launch/slurm.sh: error: this is not an allocation of SLURM: start it with sbatch" >&2
  exit 2
fi
if [[ -n "${LUTHIER_VENV:-}" ]]; then export PATH="$LUTHIER_VENV/bin:$PATH"; fi

code=0
$dry_run srun --kill-on-bad-exit=0 "$@" || code=$?
if ((code == 75)); then $dry_run scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
