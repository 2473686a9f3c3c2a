#!/usr/bin/env bash
# Runs a command, and again when it ends since another process was lost or a signal came; for workers of a pod.
# usage: launch/again.sh RESTARTS COMMAND [ARGUMENT ...]
set -euo pipefail
[[ ${1-} =~ ^[0-9]+$ && $# -ge 2 ]] || { sed -n '3s/^# //p' "$0" >&2 && exit 2; }
restarts=$1 stopping=
shift
trap 'stopping=1; kill -TERM "${child-}" 2>/dev/null || true' TERM INT
for ((attempt = 0; ; attempt++)); do
    "$@" &
    child=$! status=0
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal woke this shell, the command is still saving
        status=0
        wait "$child" || status=$?
    done
    # 0 done, 1 a check failed, 2 bad input, 3 not finite: the next time would end alike.
    ((status > 3)) && [[ -z $stopping ]] && ((attempt < restarts)) || exit "$status"
    echo "again.sh: status $status, starting again" >&2
    sleep "${TOVE_PAUSE_SECONDS:-5}"
done
