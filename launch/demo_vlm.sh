#!/usr/bin/env bash
# A language model from nothing learns to answer about drawings, with five encoders (configs/demo_vlm.py).
# usage: launch/demo_vlm.sh WORKDIR DEMO        DEMO is the folder of `make demo`; what is done there is used
set -euo pipefail
workdir=$1 demo=$2
run() {
    echo "+ tove $*" >&2
    tove "$@"
}
run extract --config=configs/demo.py "--workdir=$demo"
run train --config=configs/demo.py "--workdir=$demo"
for encoder in start distilled text both stages; do
    folder=$workdir/$encoder
    config=("--config=configs/demo_vlm.py:encoder=$encoder" "--workdir=$folder")
    config+=("--config.features.path=$demo/features" "--config.student.initialize=$demo/start")
    if [ "$encoder" = distilled ] || [ "$encoder" = stages ]; then config+=("--config.train.start_from=$demo"); fi
    run train "${config[@]}"
    run eval --tasks "held_out=$folder" "--model=$folder" "--workdir=$folder" --prompts=plain --batch=64
done
echo "answers of the five, and their differences:"
run report --answers "$workdir"/{start,distilled,text,both,stages} "--workdir=$workdir"
run report "--workdir=$workdir/stages"
run export --format=llava "--workdir=$workdir/stages"
run verify "$workdir/stages/llava"
echo "Hugging Face folder: $workdir/stages/llava"
echo "table and plot:      $workdir"
echo "report:              $workdir/stages/report.html"
