#!/usr/bin/env bash
# The whole road: pictures, experts, features, training, evaluation, export, report. ToVE's encoder needs its
# experts beside it, so it is detached from them one by one, merged into a plain tower, and that is exported.
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
if [ "$method" = tove ]; then
    run detach
    run report
    echo "report of the run:   $workdir/report.html"
    # The demo's CLIP is random and has nothing to keep, so it merges with the whole learning rate.
    merge=(tove merge "$workdir" "--config.optim.groups=(('student/.*', 1.0), ('teacher/.*', None))")
    merge+=(--config.optim.lr=1e-3 --config.train.batch=16 --config.train.steps=2000)
    echo "+ ${merge[*]}" >&2
    "${merge[@]}"
    workdir=$workdir/merged
    run eval
fi
run export
tove verify "$workdir/export"
run report
echo "Hugging Face folder: $workdir/export"
echo "report:              $workdir/report.html"
