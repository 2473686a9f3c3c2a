#!/usr/bin/env bash
# A language model from nothing learns to answer about drawings, with four encoders: the random start and the encoder of
# the demo, both frozen, and the start trained by the text loss, without and with distillation.
# usage: launch/demo_vlm.sh WORKDIR DEMO        DEMO is the folder of `make demo`; what is done there is used
set -euo pipefail
workdir=$1 demo=$2
run() {
    echo "+ tove $*" >&2
    tove "$@"
}
run extract --config=configs/demo.py "--workdir=$demo"
run train --config=configs/demo.py "--workdir=$demo"
for encoder in start distilled text both; do
    folder=$workdir/$encoder
    config=("--config=configs/demo_vlm.py:encoder=$encoder" "--workdir=$folder")
    config+=("--config.features.path=$demo/features" "--config.student.initialize=$demo/start")
    if [ "$encoder" = distilled ]; then config+=("--config.train.start_from=$demo"); fi
    run train "${config[@]}"
    run eval --tasks "held_out=$folder" "--model=$folder" "--workdir=$folder" --prompts=plain --batch=64
done
echo "answers of the four, and their differences:"
run report --answers "$workdir"/{start,distilled,text,both} "--workdir=$workdir"
run report "--workdir=$workdir/both"
run export --format=llava "--workdir=$workdir/both"
run verify "$workdir/both/llava"
echo "Hugging Face folder: $workdir/both/llava"
echo "table and plot:      $workdir"
echo "report:              $workdir/both/report.html"
