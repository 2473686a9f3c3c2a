#!/usr/bin/env bash
# Starts one command in several processes on this machine, and again when one of them was lost.
# usage: launch/local.sh [--dry-run] [--restarts=N] [--port=P] PROCESSES COMMAND [ARGUMENT ...]
#   launch/local.sh 2 tove train --config=configs/demo.py --workdir=runs/demo
# A SIGTERM is handed on, and ends the launcher with what the processes saved. Of the processes that are left when one
# was lost, those that do not end by themselves within TOVE_GRACE_SECONDS (default 60) are killed.
set -euo pipefail
dry='' restarts=3 port=''
while [[ ${1-} == --* ]]; do
    case $1 in
        --dry-run) dry=1 ;;
        --restarts=*) restarts=${1#*=} ;;
        --port=*) port=${1#*=} ;;
        *) echo "local.sh: no option $1" >&2 && exit 2 ;;
    esac
    shift
done
[[ ${1-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || { sed -n '2,4s/^# //p' "$0" >&2 && exit 2; }
count=$1 grace=${TOVE_GRACE_SECONDS:-60} stopping=
shift

environment() { # process number
    echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1"
}

run_once() {
    local status=0 one=0 left
    [[ -n $port ]] || port=$((20000 + RANDOM % 10000))
    pids=()
    for ((number = 0; number < count; number++)); do
        # shellcheck disable=SC2046
        env $(environment "$number") "$@" &
        pids+=($!)
    done
    left=("${pids[@]}")
    while ((${#left[@]})); do
        one=0
        wait -n -p ended "${left[@]}" || one=$?
        if [[ -z ${ended-} ]]; then
            ((one == 127)) || continue # a signal woke the launcher, no process has ended
            for ended in "${left[@]}"; do break; done
            one=0
            wait "$ended" || one=$? # bash has taken note of its end already, and remembers how
        fi
        for number in "${!left[@]}"; do [[ ${left[number]} == "$ended" ]] && unset "left[number]"; done
        if ((one && !status)); then
            status=$one
            echo "local.sh: a process ended with status $status" >&2
            (sleep "$grace" && kill -KILL "${pids[@]}") >/dev/null 2>&1 &
            guard=$!
        elif ((one == 2 || one == 3)); then
            status=$one # of all reasons, the one that starting again does not mend
        fi
    done
    [[ -z ${guard-} ]] || { pkill -P "$guard" || true; kill "$guard" 2>/dev/null || true; }
    unset guard
    return "$status"
}

if [[ -n $dry ]]; then
    port=${port:-PORT}
    for ((number = 0; number < count; number++)); do echo "env $(environment "$number") $*"; done
    exit 0
fi
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((attempt = 0; ; attempt++)); do
    status=0
    run_once "$@" || status=$?
    # 0 done, 1 a check failed, 2 bad input, 3 not finite: the next time would end alike.
    ((status > 3)) && [[ -z $stopping ]] && ((attempt < restarts)) || exit "$status"
    echo "local.sh: starting again, $((restarts - attempt - 1)) more times" >&2
done
