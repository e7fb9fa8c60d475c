#!/usr/bin/env bash
# A run on a Ray cluster that is up already, through its job server: ray-jobs.sh JOB.yaml http://head:8265
#
# Submitting twice is one job. When the cluster takes a node away, its engines' shards are made again elsewhere; when the
# job itself ends early (its head was replaced, or RAY_JOB_STOP_WAIT_TIME_S was too short), this script submits it again,
# and it continues. Start the cluster with RAY_JOB_STOP_WAIT_TIME_S=120: Ray's 3 seconds are too short for a commit.
# Paths in the job file are those of the cluster.
set -euo pipefail

job=${1:?usage: ray-jobs.sh JOB.yaml http://head:8265}
address=${2:?usage: ray-jobs.sh JOB.yaml http://head:8265}
tries=${TRIES:-20}
exec 3>&1

for try in $(seq "$tries"); do
    id=$(distill-pipe submit "$job" --address "$address") || { sleep 60; continue; }
    # The log goes to stdout; the last line on stderr is the job's state.
    state=$(distill-pipe logs "$id" --follow --address "$address" 2>&1 >&3 | tail -n 1) || true
    case $state in
        *SUCCEEDED) exit 0 ;;
        *STOPPED) echo "$id was cancelled" >&2; exit 143 ;;
    esac
    echo "try $try of $tries: ${state:-no answer from the cluster}" >&2
    sleep 30
done
exit 75
