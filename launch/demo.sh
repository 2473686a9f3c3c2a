#!/usr/bin/env bash
# The whole road: pictures, experts, features, training, evaluation, export, report.
# usage: launch/demo.sh METHOD WORKDIR
set -euo pipefail
method=$1 workdir=$2
run() {
    echo "+ tove $*" >&2
    tove "$@" "--config=configs/demo.py:method=$method" "--workdir=$workdir"
}
run data
run extract
run train
run eval
run export
tove verify "$workdir/export"
run report
echo "Hugging Face folder: $workdir/export"
echo "report:              $workdir/report.html"
