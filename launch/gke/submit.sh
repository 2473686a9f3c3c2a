#!/usr/bin/env bash
# One command on TPU slices or GPU nodes of a GKE cluster that has the JobSet controller, as one JobSet.
# usage: launch/gke/submit.sh [--dry-run] tpu|gpu NAME COMMAND [ARGUMENT ...]
#   IMAGE=... launch/gke/submit.sh tpu demo tove train --config=configs/demo.py --workdir=/shared/demo
# environment: IMAGE; CLAIM, a volume that all pods write, mounted as /shared (shared), where runs lie unless --workdir is
# in gs://; HOSTS of a slice, or GPU nodes; CHIPS of a host; ACCELERATOR; TOPOLOGY and SLICES (TPU); RESTARTS (20).
# A pod that is taken away gets a SIGTERM and five minutes to save; then the whole set starts again and goes on.
set -euo pipefail
dry=''
[[ ${1-} == --dry-run ]] && dry=1 && shift
[[ ${1-} =~ ^(tpu|gpu)$ && ${2-} =~ ^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$ && $# -ge 3 ]] || {
    sed -n '3,4s/^# //p' "$0" >&2 && exit 2
}
# shellcheck disable=SC2034 # read by its name below
kind=$1 NAME=$2
shift 2
[[ -n ${IMAGE-} || -n $dry ]] || { echo "submit.sh: IMAGE is missing" >&2 && exit 2; }
if [[ $kind == tpu ]]; then
    : "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${HOSTS:=4}" "${CHIPS:=4}" "${SLICES:=1}"
else
    : "${ACCELERATOR:=nvidia-h200-141gb}" "${TOPOLOGY:=}" "${HOSTS:=2}" "${CHIPS:=8}" "${SLICES:=1}"
fi
: "${IMAGE:=IMAGE}" "${CLAIM:=shared}" "${RESTARTS:=20}"
# shellcheck disable=SC2034
COMMAND=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
text=$(<"$(dirname "$0")/$kind.yaml")
for name in NAME IMAGE CLAIM HOSTS CHIPS ACCELERATOR TOPOLOGY SLICES RESTARTS COMMAND; do
    text=${text//"\${$name}"/"${!name}"}
done
if [[ -n $dry ]]; then echo "$text"; else kubectl apply -f - <<<"$text"; fi
