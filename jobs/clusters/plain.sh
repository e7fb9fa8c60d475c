#!/usr/bin/env bash
# A run on this machine alone, kept going: plain.sh JOB.yaml [--set name=value ...]
#
# SIGTERM and Ctrl-C reach the run, which commits what it can and ends with 143 or 130. Failures that may pass (7: no
# engine was left, 75: the store failed, or a kill by the system) are tried again; a wrong job file, a full disk or
# damage are not. Put it under systemd or tmux as you like.
set -euo pipefail

job=${1:?usage: plain.sh JOB.yaml [--set name=value ...]}
shift
tries=${TRIES:-20}
pause=${PAUSE:-30}
run=
trap 'kill -TERM "$run" 2>/dev/null || true' TERM
trap 'kill -INT "$run" 2>/dev/null || true' INT

for try in $(seq "$tries"); do
    ${DISTILL_PIPE:-distill-pipe} generate --job "$job" "$@" &
    run=$!
    code=0
    # A trapped signal ends `wait`, and the run may still be committing.
    while true; do
        code=0
        wait "$run" || code=$?
        kill -0 "$run" 2>/dev/null || break
    done
    case $code in
        7 | 75 | 137) echo "try $try of $tries ended with $code; again in $pause s" >&2; sleep "$pause" ;;
        *) exit "$code" ;;
    esac
done
exit 75
