#!/usr/bin/env bash
# One command on all workers of a Cloud TPU slice.
# usage: launch/tpu_vm.sh [--dry-run] up NAME                     create the slice or reuse it, copy this folder, install
#        launch/tpu_vm.sh [--dry-run] run NAME COMMAND [ARG ...]  start on all workers, in the background
#        launch/tpu_vm.sh [--dry-run] keep NAME COMMAND [ARG ...] up and run, again whenever a spot slice is taken away
#        launch/tpu_vm.sh [--dry-run] logs|stop|delete NAME       follow worker 0; SIGTERM, which saves; remove the slice
# environment: ZONE (us-central1-a), TYPE (v5litepod-16), VERSION (v2-alpha-tpuv5-lite), SPOT (1: cheaper, may be taken
# away), EXTRA (pip extras, tpu,eval), PROJECT (gcloud's own). --workdir must be a folder that all workers share, on a
# mounted disk or in a bucket (gs://..., EXTRA with cloud), see docs/object_stores.md.
set -euo pipefail
zone=${ZONE:-us-central1-a} type=${TYPE:-v5litepod-16} version=${VERSION:-v2-alpha-tpuv5-lite} extra=${EXTRA:-tpu,eval}
dry=''
[[ ${1-} == --dry-run ]] && dry=1 && shift
action=${1-} name=${2-}
[[ $action =~ ^(up|run|keep|logs|stop|delete)$ && -n $name ]] || { sed -n '3,8s/^# //p' "$0" >&2 && exit 2; }
shift 2
where=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})

do_() { if [[ -n $dry ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
tpu() { do_ gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
state() { gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)' 2>/dev/null || true; }

up() {
    local found=
    [[ -n $dry ]] || found=$(state)
    # What is left of a slice that was taken away cannot be used again.
    if [[ $found == PREEMPTED || $found == TERMINATED ]]; then tpu delete "$name" --quiet && found=; fi
    if [[ -z $found ]]; then
        tpu create "$name" --accelerator-type="$type" --version="$version" ${SPOT:+--spot}
    fi
    do_ git archive --format=tar.gz --output=/tmp/tove.tar.gz HEAD
    tpu scp /tmp/tove.tar.gz "$name": --worker=all
    tpu ssh "$name" --worker=all --command="rm -rf tove && mkdir tove && tar xzf tove.tar.gz -C tove && \
python3 -m venv --clear tove/.venv && tove/.venv/bin/pip install -q -e 'tove[$extra]'"
}

run() {
    local command
    command=$(printf '%q ' "$@")
    tpu ssh "$name" --worker=all --command="cd tove; PATH=\$PWD/.venv/bin:\$PATH \
setsid nohup launch/again.sh ${RESTARTS:-20} $command >>../tove.log 2>&1 </dev/null & echo \$! >~/tove.pid"
}

case $action in
    up) up ;;
    run) run "$@" ;;
    keep)
        up && run "$@"
        while [[ -z $dry ]]; do
            sleep "${POLL:-60}"
            [[ $(state) == READY ]] || { up && run "$@"; }
        done
        ;;
    logs) tpu ssh "$name" --worker=0 --command='tail -n 100 -F tove.log' ;;
    stop) tpu ssh "$name" --worker=all --command="kill -TERM \$(cat tove.pid)" ;;
    delete) tpu delete "$name" --quiet ;;
esac
