#!/usr/bin/env bash
# Does XMoCo help, by which reading, and what is each piece worth: every case of docs/proof.md and docs/family.md, a line
# each.
#     bash recipes/proof.sh SOURCE [SEEDS]      SOURCE: CIFAR-10, train/CLASS/IMAGE and test/CLASS/IMAGE; SEEDS: "0 1 2"
# What was measured is kept and left out, what was interrupted goes on. Start it once for each core or GPU: each takes
# what no other is at (OMP_NUM_THREADS=1 taskset -c 0 bash recipes/proof.sh SOURCE &).
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash recipes/proof.sh SOURCE [SEEDS]" >&2; exit 2; }
source=$(realpath "$1")
[ -d "$source/train" ] || { echo "SOURCE is CIFAR-10 as folders, train/CLASS/IMAGE and test/CLASS/IMAGE: $1" >&2; exit 2; }
read -ra seeds <<< "${2:-0 1 2}"
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

mkdir -p data
flock data/cifar10.lock "$python" dataprep/convert.py "$source" data/cifar10 --format ffcv
flock data/demo.lock "$python" dataprep/demo.py data/demo
flock data/demo.lock "$python" dataprep/convert.py data/demo data/demo-shards --format ffcv --max-side 128 \
    --val-fraction 0.2 # as for `make demo`

data=data/cifar10 k=200
labelled=() # --labelled and another set, to evaluate on it
# What all share: MoCo's CIFAR-10 notebook, made small for two cores, with MoCo v2's views, of which `weak-key` leaves the
# query's as it is, and a warm-up, without which so short a run is unstable
budget="--preset cifar10 --arch small --no-cifar-stem --size 16 --recipe mocov2 --batch-size 256 --head mlp --lr 0.06
    --warmup-epochs 1 --epochs 16 --loader resident --health-every 0"

# TABLE CASE CONTROL OPTIONS
try() { # its options are the budget and these
    "$python" benchmarks/proof.py --table "$1" --case "$2" --control "$3" --data "$data" "${labelled[@]}" --k "$k" \
        --seeds "${seeds[@]}" --options="$budget ${*:4}"
}

# The same of the first seed alone
once() {
    local seeds=("${seeds[0]}")
    try "$@"
}

within="--cross batch-within --cross-features encoder"
sharp="--cross queue --cross-temperature 0.1 --cross-key-temperature"

try headline moco moco --method moco
try headline xmoco moco --method xmoco
try headline co2 moco --method co2
try pieces encoder-within-64 moco --method moco "$within" --cross-weight 64
try pieces uniform moco --method moco --uniform batch
try pieces literal moco --method moco --cross batch --cross-weight 1 --uniform batch
once pieces encoder-exchange-64 moco --method moco --cross batch --cross-features encoder --cross-weight 64
once pieces within-64 moco --method moco --cross batch-within --cross-weight 64
once pieces exchange-64 moco --method moco --cross batch --cross-weight 64
once pieces sharp-1 moco --method moco "$sharp" 0.05 --cross-weight 1

# Every method with its settings for minutes (--preset demo), as long as each other
full=$budget
budget="--preset demo --size 16 --warmup-epochs 1 --epochs 8 --loader resident --health-every 0"
for method in moco xmoco co2 ressl sce mocov3 simclr nnclr byol simsiam barlow vicreg swav dino supcon; do
    once methods "short-$method" "short-$method" --method "$method"
done
for method in simclr nnclr; do
    once more "short-$method-within" "short-$method" --method "$method" "$within"
done

# The same run by a plain fp32 loop
flock --nonblock --conflict-exit-code 9 data/equivalence.lock "$python" benchmarks/equivalence.py --data "$data" \
    --seeds "${seeds[@]}" --options="--preset cifar10 --arch small --no-cifar-stem --size 16 --batch-size 256 --lr 0.06
    --warmup-epochs 1 --head mlp --loader resident" || [ $? = 9 ] # 9: another process is at it

# What is tried over a range: a quarter as long
budget=${full/--epochs 16/--epochs 4}
once queue quarter-moco quarter-moco --method moco
for key in 0.04 0.1 0.2; do
    for weight in 0.5 2 10; do
        once queue "queue-$key-$weight" quarter-moco --method moco "$sharp" "$key" --cross-weight "$weight"
    done
done
for weight in -0.1 0.1 0.3 1; do
    once uniform "quarter-uniform-$weight" quarter-moco --method moco --uniform batch --uniform-weight "$weight"
done
once more quarter-symmetric quarter-symmetric --method moco --symmetric
once more quarter-symmetric-xmoco quarter-symmetric --method xmoco --symmetric
once more quarter-decoupled quarter-decoupled --method moco --decoupled
once more quarter-decoupled-xmoco quarter-decoupled --method xmoco --decoupled

# Another set altogether: the drawn images of `make demo`, with its settings
data=data/demo-shards k=20 budget="--preset demo --warmup-epochs 2"
try drawn drawn-moco drawn-moco --method moco
try drawn drawn-xmoco drawn-moco --method xmoco

# A weak view for the key
data=data/cifar10 k=200 budget=${full/--epochs 16/--epochs 4}
once weak quarter-moco-weak quarter-moco-weak --method moco --recipe weak-key
once weak quarter-weak-encoder-within-64 quarter-moco-weak --method moco "$within" --cross-weight 64 --recipe weak-key
budget=$full
once weak moco-weak moco-weak --method moco --recipe weak-key
once weak weak-sharp-1 moco-weak --method moco "$sharp" 0.05 --cross-weight 1 --recipe weak-key

# The rest of the family beside its hosts: TABLE, and a word before the names of its cases
family() {
    once "$1" "$2-moco" "$2-moco" --method moco
    once "$1" "$2-feature-transform" "$2-moco" --method moco --feature-transform
    once "$1" "$2-hiclr" "$2-moco" --method hiclr
    once "$1" "$2-cacr-queue" "$2-moco" --method cacr-queue
    once "$1" "$2-simclr" "$2-simclr" --method simclr
    once "$1" "$2-learnt-augmentation" "$2-simclr" --method simclr --learnt-augmentation 0.1
    once "$1" "$2-communities" "$2-simclr" --method simclr --communities 10
    mkdir -p runs/proof && flock "runs/proof/$2-simclr-${seeds[0]}.lock" true # another may be training its anchor
    once "$1" "$2-anchor" "$2-simclr" --method simclr --anchor "runs/proof/$2-simclr-${seeds[0]}"
    once "$1" "$2-mv-infonce" "$2-simclr" --method mv-infonce
    once "$1" "$2-mv-dhel" "$2-simclr" --method mv-dhel
    once "$1" "$2-compactness" "$2-mv-dhel" --method mv-dhel --compactness 0.3
    once "$1" "$2-supcon" "$2-supcon" --method supcon
    once "$1" "$2-hydra" "$2-supcon" --method hydra
}

# Those that are for small batches; the same
weighted() {
    once "$1" "$2-meow" "$2-moco" --method moco --negatives meow --clusters 10 30 100
    once "$1" "$2-adameow" "$2-moco" --method moco --negatives adameow
    once "$1" "$2-cacr" "$2-simclr" --method cacr
}

# Each with its settings for minutes, at half the size
data=data/demo-shards k=20 budget="--preset demo --size 16 --warmup-epochs 2"
family family_drawn demo
weighted family_drawn demo
once family_drawn demo-bacon demo-simclr --method bacon
once family_drawn demo-learnt-augmentation-0.05 demo-simclr --method simclr --learnt-augmentation 0.05
# at 16 px the feature map has no more than 2 x 2 places
budget="--preset demo --warmup-epochs 2"
once family_drawn drawn-foreground drawn-moco --method moco --foreground 1

# Classes that are unequally frequent: 5,000 images of the first, 50 of the last, as in arXiv 1906.07413
(
    flock 9
    class=0
    for folder in "$source"/train/*/; do
        files=("$folder"*)
        count=$(awk "BEGIN { print int(5000 * 0.01 ^ ($class / 9)) }")
        mkdir -p "data/cifar10-long/train/$(basename "$folder")"
        ln -sft "data/cifar10-long/train/$(basename "$folder")" "${files[@]:0:count}"
        class=$((class + 1))
    done
    ln -sfn "$source/test" data/cifar10-long/test
    "$python" dataprep/convert.py data/cifar10-long data/cifar10-long-shards --format ffcv
) 9> data/cifar10-long.lock
brief="--preset demo --size 16 --warmup-epochs 1 --epochs 2 --loader resident --health-every 0"
data=data/cifar10-long-shards k=200 budget=${brief/--epochs 2/--epochs 8}
once family_long long-simclr long-simclr --method simclr
once family_long long-bacon long-simclr --method bacon

# A case's run as another case's, which evaluates it otherwise: CASE OTHER
as_well() {
    local run="runs/proof/$1-${seeds[0]}" copy="runs/proof/$2-${seeds[0]}"
    mkdir -p runs/proof && flock "$run.lock" true # another may be training it
    (
        flock 9
        [ -d "$copy" ] || [ ! -d "$run" ] || { cp -rT "$run" "$copy.part" && mv "$copy.part" "$copy"; }
    ) 9> "$copy.lock"
}

# Photographs alone, and photographs with a shape on them, by the shape; then the latter by what was photographed
(
    flock 9
    [ -d data/backgrounds ] || "$python" benchmarks/backgrounds.py "$source" data/backgrounds
    for labels in shapes photographs; do
        "$python" dataprep/convert.py "data/backgrounds/$labels" "data/backgrounds-$labels" --format ffcv
    done
) 9> data/backgrounds.lock
data=data/backgrounds-shapes budget="${brief/--epochs 2/--epochs 4} --recipe mocov2 --blur 0"
once family_background shapes-simclr shapes-simclr --method simclr
once family_background shapes-sepclr shapes-simclr --method sepclr --background 0
once family_background shapes-sepclr-common shapes-simclr --method sepclr --background 0 --evaluated common
labelled=(--labelled data/backgrounds-photographs)
for case in simclr sepclr sepclr-common; do as_well "shapes-$case" "photographs-$case"; done
once family_background photographs-simclr photographs-simclr --method simclr
once family_background photographs-sepclr photographs-simclr --method sepclr --background 0
once family_background photographs-sepclr-common photographs-simclr --method sepclr --background 0 --evaluated common
labelled=()

# Few images in a step
data=data/cifar10 budget="$brief --batch-size 32"
once family_small small-moco small-moco --method moco
once family_small small-simclr small-simclr --method simclr
weighted family_small small
once family_small small-cacr-2-views small-simclr --method cacr --num-views 2 # as many passes as SimCLR
budget="${budget/--epochs 2/--epochs 5}" # as many passes as cacr's five views take
once family_small small-simclr-5-epochs small-simclr --method simclr

# All as long as each other
budget=$brief
family family brief
budget="${budget/--epochs 2/--epochs 4}" # as many passes as four views take
once family brief-simclr-4-epochs brief-simclr --method simclr
