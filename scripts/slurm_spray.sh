#!/usr/bin/env bash
# A spray run as a Slurm job that is preempted, runs out of time or loses its node, and goes on by itself:
#
#     sbatch scripts/slurm_spray.sh run_dir=/shared/audit experiment=image_folder dataset.train=/shared/data/train …
#
# The arguments are those of `spray`; run_dir has to be among them, on a file system that all nodes see. Two minutes
# before the job's time is over Slurm sends SIGTERM to this script, which passes it on; spray drops the shards it is
# at, keeps all that are done, and ends with code 75 ("resume me"); the job is put back into the queue and goes on.
#
# One GPU, as it stands here. Otherwise change:
# - 8 GPUs in one node:  --gpus=8 --cpus-per-task=64 --mem=256G, and add compute=dask_cuda to the arguments.
# - 20 nodes:            this job only hands out work: no --gpus, --cpus-per-task=2 --mem=8G; and add
#                          compute=dask_slurm compute.slurm.jobs=160 compute.slurm.queue=gpu compute.slurm.cores=8
#                          compute.slurm.memory=32GB compute.slurm.walltime="'04:00:00'"
#                          "compute.slurm.job_extra_directives=['--gpus=1']"
#                        160 jobs of one GPU start as GPUs become free, wherever they are. plan=true shows the script
#                        of such a job. The stages that are not shared out (training, correction) run in this job:
#                        give it a GPU if they are long, or run them first: stages=[train].
# - CPUs only:           no --gpus; compute=dask_local.
#
#SBATCH --job-name=spray
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=spray-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -u

# The command, and how often at most the job puts itself back.
SPRAY=${SPRAY:-spray}
MOST_RESTARTS=${MOST_RESTARTS:-100}

# module load cuda
# source /shared/venv/bin/activate

case " $* " in
    *" run_dir="*) ;;
    *)
        echo "slurm_spray.sh: give run_dir=DIR, on a file system that all nodes see: a restart goes on from there" >&2
        exit 2
        ;;
esac

stopped=0
child=
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM USR1

# In the background, since bash runs traps only while it waits.
# shellcheck disable=SC2086  # SPRAY may have words of its own, such as "srun spray"
$SPRAY "$@" &
child=$!
# A signal from before the line above had nobody to go to.
[ "$stopped" -eq 1 ] && kill -TERM "$child" 2>/dev/null
while :; do
    wait "$child"
    code=$?
    # A signal ends `wait` early, with a code above 128; then spray is still there.
    kill -0 "$child" 2>/dev/null || break
done
# The signal may have come between the end of spray and here, or before it could take one.
if [ "$code" -gt 128 ] && [ "$stopped" -eq 1 ]; then
    wait "$child" 2>/dev/null
    last=$?
    [ "$last" -ne 127 ] && code=$last
    [ "$code" -eq 143 ] && code=75
fi

if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MOST_RESTARTS" ]; then
        echo "slurm_spray.sh: restarted $MOST_RESTARTS times; not put back again" >&2
        exit "$code"
    fi
    echo "slurm_spray.sh: job $SLURM_JOB_ID is put back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "slurm_spray.sh: Slurm does not take it back; submit the same command to go on" >&2
fi
exit "$code"
