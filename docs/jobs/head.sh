#!/bin/sh
# One head of a stream, by a job array: head N is trained by job N.
#
#   sbatch --array=0-4 docs/jobs/head.sh --config=configs/digits.py
#
# More flags go to experiments.train. A job that is started again, by --requeue
# or by the same command after a time limit, goes on from its last save. When all
# are done:
#
#   python -m experiments.assemble --workdir=runs/whole \
#     --parts=$(printf 'runs/heads/%s,' 0 1 2 3 4 | sed 's/,$//')
#
# The jobs need no link, only a folder that the last command can read.
#SBATCH --job-name=mhil-head
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -eu
head=${SLURM_ARRAY_TASK_ID:-${JOB_COMPLETION_INDEX:?no number of a job array}}
folder=${RUNS:-runs/heads}/$head
set -- "$@" --heads="$head" --workdir="$folder" --quiet
[ ! -f "$folder/config.json" ] || set -- "$@" --resume
"${PYTHON:-python}" -m experiments.train "$@" &
child=$!
# A signal is handed on: the run saves and ends, with a status that says that
# this job is not done.
trap 'kill -TERM "$child"' TERM INT
status=0
wait "$child" || status=$?
[ "$status" -le 128 ] || { status=0; wait "$child" || status=$?; }
exit "$status"
