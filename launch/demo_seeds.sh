#!/usr/bin/env bash
# Trains the demo again with other seeds (adapters, data order, mirrors; the same start and features)
# and prints means and spreads over all of them.
# usage: launch/demo_seeds.sh METHOD WORKDIR SEED [SEED ...]     after launch/demo.sh METHOD WORKDIR
set -euo pipefail
method=$1 workdir=$2
shift 2
runs=("$workdir")
for seed in "$@"; do
    run="$workdir-seed$seed"
    mkdir -p "$run"
    [ -d "$run/start" ] || cp -r "$workdir/start" "$run/start"
    config=("--config=configs/demo.py:method=$method,seed=$seed" "--workdir=$run" "--config.features.path=$workdir/features")
    tove train "${config[@]}"
    tove eval "${config[@]}"
    runs+=("$run")
done
tove eval "--config=configs/demo.py:method=$method" "--workdir=$workdir" \
    "--config.features.path=$workdir/features" --seeds "${runs[@]:1}"
