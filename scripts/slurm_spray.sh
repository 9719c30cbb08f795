#!/usr/bin/env bash
# Runs spray as a Slurm job that goes on by itself after pre-emption and after its time limit:
#   sbatch scripts/slurm_spray.sh experiment=image_folder dataset.train=… model.factory=… run_dir=/shared/audit
# Lines to change are marked; options of sbatch on its command line win over those here.
#
# 8 GPUs of one node:  sbatch --gpus=8 --cpus-per-task=64 --mem=256G scripts/slurm_spray.sh compute=dask_cuda …
# 20 nodes:            sbatch --gpus=0 --cpus-per-task=4 scripts/slurm_spray.sh compute=dask_slurm compute.slurm.jobs=20 \
#                          compute.slurm.queue=gpu 'compute.slurm.job_extra_directives=[--gpus=1]' …
#                      The job runs the scheduler and submits the workers' jobs; its time limit has to outlast them.
#SBATCH --job-name=spray
#SBATCH --output=spray-%j.log
#SBATCH --open-mode=append
#SBATCH --time=04:00:00        # change
#SBATCH --gpus=1               # change
#SBATCH --cpus-per-task=8      # change
#SBATCH --mem=32G              # change
#SBATCH --requeue
# Two minutes before the limit, and to this script, not to its steps: it passes the signal on.
#SBATCH --signal=B:TERM@120
set -uo pipefail

SPRAY="${SPRAY:-spray}"        # change: where the command is, such as /shared/spray/.venv/bin/spray
RESUME=75                      # the command's exit code for "interrupted, give the same command again"
MOST_RESTARTS="${MOST_RESTARTS:-50}"

case " $* " in
    *" run_dir="*) ;;
    *) echo "slurm_spray.sh: give run_dir=DIR on a shared file system: only so can the job go on" >&2; exit 2 ;;
esac

"$SPRAY" "$@" &
command=$!
# Bash runs a trap only when what it waits for ends, which for `wait` is at once.
trap 'kill -TERM "$command" 2>/dev/null' TERM USR1
wait "$command"
code=$?
# A wait that a signal broke off says 128 + its number; the command itself is still to end.
while kill -0 "$command" 2>/dev/null; do
    wait "$command"
    code=$?
done
trap - TERM USR1

if [[ "$code" == "$RESUME" && -n "${SLURM_JOB_ID:-}" ]]; then
    if (( ${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS )); then
        echo "slurm_spray.sh: interrupted; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
    echo "slurm_spray.sh: interrupted, and not queued again; submit the same command to go on" >&2
fi
exit "$code"
