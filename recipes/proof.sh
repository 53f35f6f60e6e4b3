#!/usr/bin/env bash
# Does XMoCo help, by which reading, and what is each piece worth: every case of docs/proof.md, a line each.
#     bash recipes/proof.sh SOURCE [SEEDS]      SOURCE: CIFAR-10, as for cifar10.sh; SEEDS: "0 1 2" unless given
# What was measured is kept and left out, what was interrupted goes on. Start it once for each core or GPU: each takes
# what no other is at (OMP_NUM_THREADS=1 taskset -c 0 bash recipes/proof.sh SOURCE &).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash recipes/proof.sh SOURCE [SEEDS]" >&2; exit 2; }
source=$(realpath "$1")
read -ra seeds <<< "${2:-0 1 2}"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" dataprep/convert.py "$source" data/cifar10 --format ffcv

# What all share: MoCo's CIFAR-10 notebook, made small for two cores, its first epoch a warm-up, without which so short
# a run is unstable
budget="--preset cifar10 --arch small --no-cifar-stem --size 16 --batch-size 256 --head mlp --lr 0.06 --warmup-epochs 1
    --epochs 10 --loader resident --health-every 0"

# TABLE CASE CONTROL OPTIONS
try() {
    "$python" benchmarks/proof.py --table "$1" --case "$2" --control "$3" --data data/cifar10 --seeds "${seeds[@]}" \
        --options="$budget ${*:4}"
}

sharp="--method moco --cross queue --cross-temperature 0.1 --cross-key-temperature"

try pieces moco moco --method moco
try pieces xmoco-literal moco --method moco --cross batch --uniform batch
try weak moco-weak moco-weak --method moco --recipe weak-key
try weak weak-sharp04-0.5 moco-weak "$sharp" 0.04 --cross-weight 0.5 --recipe weak-key
try weak weak-sharp04-2 moco-weak "$sharp" 0.04 --cross-weight 2 --recipe weak-key
try queue sharp04-0.5 moco "$sharp" 0.04 --cross-weight 0.5
try queue sharp04-2 moco "$sharp" 0.04 --cross-weight 2
try queue queue10-2 moco "$sharp" 0.1 --cross-weight 2
try queue queue20-2 moco "$sharp" 0.2 --cross-weight 2
try pieces cross-batch-1 moco --method moco --cross batch --cross-weight 1
try pieces cross-batch-30 moco --method moco --cross batch --cross-weight 30
try pieces uniform-batch-1 moco --method moco --uniform batch --uniform-weight 1
try pieces uniform-batch-0.1 moco --method moco --uniform batch --uniform-weight 0.1
try pieces uniform-batch-minus moco --method moco --uniform batch --uniform-weight -0.1
try pieces uniform-queue-1 moco --method moco --uniform queue --uniform-weight 1
