#!/usr/bin/env bash
# MoCo's CIFAR-10 notebook, and XMoCo beside it with the same settings: ResNet-18, 200 epochs each. A GPU is advisable.
#     bash recipes/cifar10.sh SOURCE [OPTIONS of train.py, such as --max-steps 20]
# SOURCE is CIFAR-10 in any form that convert.py reads: its batches, or train/<class>/*.png and test/<class>/*.png, whose
# pixels stay exact. Run it again and it goes on where it stopped. The notebook's kNN is over projections.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: bash recipes/cifar10.sh SOURCE [OPTIONS of train.py]" >&2; exit 2; }
source=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" dataprep/convert.py "$source" data/cifar10 --format ffcv
for method in moco xmoco; do
    run=runs/cifar10-$method
    "$python" fasttrain/train.py --data data/cifar10 --preset cifar10 --method "$method" --loader resident --run "$run" "$@"
    "$python" fasttrain/evaluate.py "$run" --data data/cifar10 --knn --k 200 --temperature 0.1 --features projection
    "$python" fasttrain/evaluate.py "$run" --data data/cifar10 --knn --k 200 --temperature 0.1 --linear
done
"$python" fasttrain/report.py runs/cifar10-moco runs/cifar10-xmoco
